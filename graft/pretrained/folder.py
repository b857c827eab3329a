"""Finds model folders, on this machine or on the Hub, and opens them in either layout.

Meta's layout has params.json; Hugging Face's has config.json, and so has what `convert.py` writes.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.companions import COMPANIONS
from graft.pretrained.hub import fetch_from_hub, is_repo_name
from graft.pretrained.hugging_face import (
    in_one,
    open_hugging_face_folder,
    read_hugging_face_config,
    weight_files,
)
from graft.pretrained.meta import open_meta_folder
from graft.storage.float8 import Float8Tensor, with_decoded_floats
from graft.storage.lazy_tensors import LazyTensor, read
from graft.storage.safetensors import open_safetensors
from graft.storage.tensor_file import read_weight_file

import mlx.core as mx

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "sapling"
# Globs of weights to fetch from the Hub: each tuple is tried if the one before it matches nothing.
LOADABLE = (("model*.safetensors", "weights*.npz"),)
CONVERTIBLE = (("model*.safetensors",), ("pytorch_model*.bin",))


def find_folder(
    name: str | Path | None,
    *,
    option: str = "--model",
    weights: Sequence[Sequence[str]] = LOADABLE,
) -> Path:
    """The local folder of a model, downloaded from the Hub if `name` is a repository's.

    Args:
        name: a folder, owner/name on the Hub, or `None` for the included base model.
        option: the option that takes the name, for messages.
        weights: globs of the weight files to fetch, in order of preference.

    Raises:
        InputError: there is no such folder or repository.
    """
    if name is None:
        return EMBEDDED_MODEL
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file; {option} takes a folder or a Hub name")
    if not is_repo_name(str(name)):
        raise InputError(
            f"there is no model folder {name}; {option} takes a folder or owner/name on the Hub"
        )
    for patterns in weights:
        folder = fetch_from_hub(str(name), ["*.json", *COMPANIONS, *patterns])
        if any(True for pattern in patterns for _ in folder.glob(pattern)):
            break
    return folder


def has_meta_layout(folder: Path) -> bool:
    """Whether a folder has Meta's layout and not also Hugging Face's."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def has_hugging_face_layout(folder: Path) -> bool:
    """Whether a folder has Hugging Face's layout and not also Meta's."""
    return (folder / "config.json").is_file() and not (folder / "params.json").is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder, as config.json has it or would have it.

    Raises:
        InputError: there is no configuration.
    """
    if has_meta_layout(folder):
        return open_meta_folder(folder)[0]
    return read_hugging_face_config(folder)


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The configuration of a model folder and its tensors by name, left on disk.

    Raises:
        InputError: files are missing or damaged.
    """
    return open_meta_folder(folder) if has_meta_layout(folder) else open_hugging_face_folder(folder)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The configuration of a model folder and its arrays by name.

    Raises:
        InputError: files are missing or damaged, or the weights are PyTorch's.
    """
    if has_meta_layout(folder):
        config, tensors = open_meta_folder(folder)
        return config, {name: read(tensor) for name, tensor in tensors.items()}
    config, files = read_hugging_face_config(folder), weight_files(folder)
    if files[0].suffix == ".bin":
        raise InputError(
            f"{folder} has PyTorch weights; convert them with "
            f"`python -m graft convert --hf-path {shlex.quote(str(folder))}`"
        )
    arrays = in_one({file: read_weight_file(file) for file in files})
    if files[0].suffix == ".safetensors":
        tensors = with_decoded_floats(in_one({file: open_safetensors(file) for file in files}))
        for name, tensor in tensors.items():
            if isinstance(tensor, Float8Tensor):
                arrays[name] = tensor.decoded(arrays[name])
    return config, arrays
