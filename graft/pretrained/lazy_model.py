"""A base model on disk, its tensors unread: what fusing and extracting stream through.

Knows the folders that `graft.pretrained.load` reads; knows nothing of adapters.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graft.errors import InputError
from graft.pretrained.hugging_face import open_hugging_face_folder, with_rope_settings
from graft.pretrained.load import build_model, quantize_as_saved
from graft.pretrained.meta import open_meta_folder
from graft.pretrained.mlx_names import (
    Tensors,
    parameters_of,
    quantization_of,
    translated,
    under_mlx_names,
)
from graft.storage.json_file import read_json
from graft.storage.lazy_tensors import check_fit
from graft.storage.npz import open_npz

import mlx.nn as nn

# What goes along with the weights. Never code.
COMPANIONS = (".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".txt")
NOT_COMPANIONS = ("config.json", "params.json", "adapter_config.json")


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
    tensors: Tensors


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
    config, tensors = _open(folder)
    if quantization_of(config) and "quantization" not in config:
        config, tensors = translated(folder)
    model = build_model(config)
    staged = scratch / "staged.safetensors"
    try:
        tensors, _ = under_mlx_names(model, tensors, staged)
        if "quantization" in config:
            quantize_as_saved(model, config["quantization"], cast(Any, tensors))
        check_fit(parameters_of(model), tensors, str(folder))
        yield BaseFiles(folder, config, model, tensors)
    finally:
        staged.unlink(missing_ok=True)


def _open(folder: Path) -> tuple[dict[str, Any], Tensors]:
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        return open_meta_folder(folder)
    files = sorted(folder.glob("weights*.npz"))
    if files and not any(folder.glob("model*.safetensors")):
        tensors: Tensors = {}
        for file in files:
            tensors |= open_npz(file)
        return with_rope_settings(read_json(folder / "config.json")), tensors
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; it is no model folder")
    return open_hugging_face_folder(folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer and what else stands beside the weights, but no code."""
    for file in source.iterdir():
        index = file.name.endswith(".index.json")
        if file.suffix in COMPANIONS and not index and file.name not in NOT_COMPANIONS:
            shutil.copyfile(file, folder / file.name)
