"""Reads and writes npz files, tensor by tensor.

MLX's own writer wants all arrays at once; this one takes them as they come, so that a file may be
larger than memory.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from graft.errors import InputError
from graft.storage.lazy_tensors import (
    NUMPY_NAMES,
    ComputedTensor,
    LazyTensor,
    Output,
    StoredTensor,
    contiguous_strides,
)

import mlx.core as mx
import numpy as np

_DTYPES = {
    np.dtype(name).str[1:]: dtype
    for dtype, name in NUMPY_NAMES.items()
    if dtype not in (mx.bool_, mx.bfloat16)
}


def write_npz(path: Path, outputs: Iterable[Output]) -> None:
    """Write an npz file for `mx.load`; bfloat16 as MLX writes it, two raw bytes an element."""
    # Over an open file: given a path, ZipFile closes it a second time after a full disk, and tells.
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for output in outputs:
            # A ZipInfo of its own has a fixed date, so equal tensors make equal files.
            with archive.open(
                zipfile.ZipInfo(f"{output.name}.npy"), "w", force_zip64=True
            ) as member:
                member.write(_npy_header(output))
                for block in output.blocks:
                    member.write(output.raw(block))


def open_npz(path: Path) -> dict[str, LazyTensor]:
    """Find the tensors of an npz file without reading them; compressed ones are read.

    Raises:
        InputError: the file is missing, cut off or no npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return {
                info.filename.removesuffix(".npy"): _open_member(path, archive, file, info)
                for info in archive.infolist()
            }
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or no npz file ({error}); make it again") from error


def _open_member(
    path: Path, archive: zipfile.ZipFile, file: io.BufferedReader, info: zipfile.ZipInfo
) -> LazyTensor:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"{info.filename} has version {version}")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(member)
        start = member.tell()
        # MLX calls a single dimension columns first, which comes to the same.
        if (columns_first and len(shape) > 1) or math.prod(
            shape
        ) * dtype.itemsize != info.file_size - start:
            raise ValueError(f"{info.filename} has no rows of {dtype} in shape {shape}")
        kind = mx.bfloat16 if dtype == np.dtype("V2") else _DTYPES[dtype.str[1:]]
        if info.compress_type != zipfile.ZIP_STORED:
            array = mx.array(np.frombuffer(member.read(), np.uint8)).view(kind)
            return ComputedTensor(array.reshape(shape))
    file.seek(info.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    start += info.header_offset + 30 + name_bytes + extra_bytes
    return StoredTensor(path, start, kind, shape, contiguous_strides(shape))


def _npy_header(output: Output) -> bytes:
    kinds = {mx.bool_: "|b1", mx.uint8: "|u1", mx.int8: "|i1", mx.bfloat16: "<V2"}
    name = str(output.dtype).removeprefix("mlx.core.")
    descr = kinds[output.dtype] if output.dtype in kinds else np.dtype(name).str
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": output.shape}
    )
    return header.getvalue()
