"""A base model on disk, its tensors unread: what fusing and extracting stream through.

Knows the folders that `graft.pretrained.load` reads; knows nothing of adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graft.pretrained.folder import open_folder
from graft.pretrained.foreign_quantization import is_foreign, open_foreign
from graft.pretrained.load import build_model, quantize_as_saved
from graft.pretrained.mlx_names import parameters_of, under_mlx_names
from graft.storage.lazy_tensors import LazyTensor, check_fit

import mlx.nn as nn


@dataclass(frozen=True)
class BaseFiles:
    """A base model with its tensors on disk.

    Attributes:
        folder: where it is.
        config: as config.json has it, or would.
        model: the architecture, quantized as the tensors are; its weights are placeholders that
            are never computed.
        tensors: under mlx-lm's names.
    """

    folder: Path
    config: dict[str, Any]
    model: nn.Module
    tensors: dict[str, LazyTensor]


@contextmanager
def open_base(folder: Path, scratch: Path) -> Iterator[BaseFiles]:
    """Find the tensors of a model folder without reading them.

    Args:
        folder: of any layout that Graft loads.
        scratch: a folder for a copy of the tensors, should the architecture's own renaming need
            one.

    Raises:
        InputError: the folder is incomplete or damaged.
    """
    config, tensors = open_folder(folder)
    if is_foreign(config):
        config, tensors = open_foreign(folder, config)
    model = build_model(config)
    staged = scratch / "staged.safetensors"
    try:
        tensors, _ = under_mlx_names(model, tensors, staged, place=str(folder))
        if "quantization" in config:
            quantize_as_saved(model, config["quantization"], cast(Any, tensors))
        check_fit(parameters_of(model), tensors, str(folder))
        yield BaseFiles(folder, config, model, tensors)
    finally:
        staged.unlink(missing_ok=True)
