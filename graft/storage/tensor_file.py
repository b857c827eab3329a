"""Reads whole tensor files that nobody vouches for: npz, safetensors and PyTorch's.

A header may lie: every size is compared with the file's before memory is taken. What is broken is
one line. Knows nothing of what the tensors mean.
"""

import math
import zipfile
from pathlib import Path

from graft.errors import InputError, first_line
from graft.storage.lazy_tensors import StoredTensor, read
from graft.storage.safetensors import open_safetensors
from graft.storage.torch_file import open_checkpoint

import mlx.core as mx
import numpy as np

# Trained numbers hardly compress; a start at zero does. More than this is a bomb.
LARGEST_RATIO = 64
_FLOATS = (mx.float16, mx.bfloat16, mx.float32, mx.float64)


def read_tensor_file(path: Path) -> dict[str, mx.array]:
    """All arrays of a file, whichever of the three it is.

    Raises:
        InputError: the file is missing, damaged, larger inside than outside, or holds numbers that
            no adapter is made of.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        if start[:2] != b"PK":
            tensors = _read_stored(path, open_safetensors(path))
        elif _is_torch(path):
            tensors = _read_stored(path, open_checkpoint(path))
        else:
            tensors = _read_npz(path)
    except InputError as error:
        if str(path) in str(error):
            reason = str(error).removeprefix(f"{path} is ")
            raise InputError(f"{path} is damaged or incomplete: {reason}") from error
        raise
    except Exception as error:  # a fuzzed file finds every branch of zipfile, json and NumPy
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error
    if wrong := [f"{name} ({a.dtype})" for name, a in tensors.items() if a.dtype not in _FLOATS]:
        raise InputError(f"{path} holds numbers that no adapter is made of: {', '.join(wrong)}")
    return {
        name: array.astype(mx.float32, stream=mx.cpu) if array.dtype == mx.float64 else array
        for name, array in tensors.items()
    }


def _is_torch(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _read_stored(path: Path, stored: dict[str, StoredTensor]) -> dict[str, mx.array]:
    inside = sum(math.prod(tensor.shape) * tensor.dtype.size for tensor in stored.values())
    if inside > path.stat().st_size:
        raise ValueError(f"{inside} bytes of tensors in a file of {path.stat().st_size}")
    return {name: read(tensor) for name, tensor in stored.items()}


def _read_npz(path: Path) -> dict[str, mx.array]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        inside = sum(member.file_size for member in members)
        if inside > LARGEST_RATIO * path.stat().st_size:
            raise ValueError(f"{inside} bytes in a file of {path.stat().st_size}")
        return {m.filename.removesuffix(".npy"): _read_member(archive, m) for m in members}


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> mx.array:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = header(member)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects")
        told, there = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
        if told != there:
            raise ValueError(f"{info.filename} tells of {told} bytes and has {there}")
        content = member.read()  # to the end, where the checksum is compared
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
    if dtype == np.dtype("V2"):  # how MLX writes bfloat16, which NumPy lacks
        return mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.ascontiguousarray(array))
