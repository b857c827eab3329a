"""A model whose tensors stay on disk: converting, fusing and extracting read them one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graft.pretrained.folder import open_folder
from graft.pretrained.foreign_quantization import is_foreign, open_foreign
from graft.pretrained.known_differences import check_differences
from graft.pretrained.load import build_model, quantize_as_saved
from graft.pretrained.mlx_names import parameters_of, under_mlx_names
from graft.storage.lazy_tensors import LazyTensor, check_fit

import mlx.nn as nn


@dataclass(frozen=True)
class BaseFiles:
    """A model with its tensors on disk.

    Attributes:
        folder: where it is.
        config: as config.json has it or would have it.
        model: the architecture, quantized as the tensors are. Its own weights are placeholders
            that are never computed.
        tensors: under mlx-lm's names.
        parameters: how many the model has; a quantized weight counts as a whole one.
        notes: on tensors that the architecture does not use, and on differences from transformers,
            a line each.
    """

    folder: Path
    config: dict[str, Any]
    model: nn.Module
    tensors: dict[str, LazyTensor]
    parameters: int
    notes: list[str]


@contextmanager
def open_base(folder: Path, scratch: Path) -> Iterator[BaseFiles]:
    """Open a model folder without reading its tensors.

    Args:
        folder: of any layout that Graft reads.
        scratch: a folder for a copy of the tensors, which some architectures need.

    Raises:
        InputError: the folder is incomplete or damaged.
    """
    staged = scratch / "staged.safetensors"
    try:
        yield fit_tensors(folder, *open_folder(folder), staged)
    finally:
        staged.unlink(missing_ok=True)


def fit_tensors(
    folder: Path, config: dict[str, Any], tensors: dict[str, LazyTensor], staged: Path
) -> BaseFiles:
    """Put a checkpoint's tensors under the names of its architecture in mlx-lm.

    Args:
        folder: the checkpoint's.
        config: its configuration.
        tensors: by the checkpoint's names.
        staged: a file for a copy of the tensors, written if the architecture's own renaming needs
            one; it must outlive the result.

    Raises:
        InputError: an unknown architecture, or tensors that do not fit it.
    """
    if is_foreign(config):
        config, tensors = open_foreign(folder, config)
    model = build_model(config)
    parameters = sum(array.size for array in parameters_of(model).values())
    tensors, notes = under_mlx_names(model, tensors, staged, source=str(folder))
    if "quantization" in config:
        quantize_as_saved(model, config["quantization"], cast(Any, tensors))
    check_fit(parameters_of(model), tensors, str(folder))
    notes = [*notes, *check_differences(model, config)]
    return BaseFiles(folder, config, model, tensors, parameters, notes)
