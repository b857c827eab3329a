"""Reads untrusted files of tensors: npz, safetensors and PyTorch's.

A header may be wrong, so every size is checked against the file before memory is taken. All damage
is reported in one line.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from graft.errors import InputError, first_line
from graft.storage.lazy_tensors import LazyTensor, read, size_bytes
from graft.storage.npz import load_npz
from graft.storage.plain_file import read_start
from graft.storage.safetensors import load_safetensors, open_safetensors
from graft.storage.torch_file import open_torch_file

import mlx.core as mx

_FLOATS = (mx.float16, mx.bfloat16, mx.float32, mx.float64)


def read_tensor_file(path: Path) -> dict[str, mx.array]:
    """The arrays of an adapter's file, read now; float64 becomes float32.

    Raises:
        InputError: the file is missing or damaged, its tensors take more bytes than the file, or
            some of them are not floats.
    """
    tensors = _read(path, lazily=False)
    if wrong := [f"{name} ({a.dtype})" for name, a in tensors.items() if a.dtype not in _FLOATS]:
        raise InputError(f"{path} holds tensors that are not floats: {', '.join(wrong)}")
    return {
        name: array.astype(mx.float32, stream=mx.cpu) if array.dtype == mx.float64 else array
        for name, array in tensors.items()
    }


def read_weight_file(path: Path) -> dict[str, mx.array]:
    """The arrays of a model's file, of any type; MLX reads those of safetensors when it needs them.

    Raises:
        InputError: the file is missing or damaged.
    """
    return _read(path, lazily=True)


def _read(path: Path, *, lazily: bool) -> dict[str, mx.array]:
    try:
        if read_start(path, 2) != b"PK":
            stored = open_safetensors(path)
            loadable = not any(tensor.float8 == "F8_E5M2" for tensor in stored.values())
            return load_safetensors(path) if lazily and loadable else _read_stored(path, stored)
        if _is_torch(path):
            return _read_stored(path, open_torch_file(path))
        return load_npz(path)
    except InputError as error:
        if str(error).startswith(("cannot read", f"{path} is missing")):
            raise
        reason = str(error).removeprefix(f"{path} is ")
        raise InputError(f"{path} is damaged or incomplete: {reason}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # a fuzzed file finds every branch of zipfile, json and NumPy
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error


def _is_torch(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _read_stored(path: Path, stored: Mapping[str, LazyTensor]) -> dict[str, mx.array]:
    # Views may overlap: a small file could otherwise hold tensors of any total size.
    total, file_bytes = sum(map(size_bytes, stored.values())), path.stat().st_size
    if total > file_bytes:
        raise ValueError(f"{total} bytes of tensors in a file of {file_bytes}")
    return {name: read(tensor) for name, tensor in stored.items()}
