"""Reads and writes npz files, tensor by tensor.

MLX's own writer needs all arrays at once. This one writes each as it is made, so a file may be
larger than memory.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from graft.console import one_line
from graft.errors import InputError
from graft.storage.lazy_tensors import (
    NUMPY_NAMES,
    ComputedTensor,
    LazyTensor,
    Output,
    StoredTensor,
    check_shape,
    contiguous_strides,
)
from graft.storage.plain_file import open_plain
from graft.storage.zip_members import check_members, data_offset

import mlx.core as mx
import numpy as np

_DTYPES = {
    np.dtype(name).str[1:]: dtype for dtype, name in NUMPY_NAMES.items() if dtype != mx.bfloat16
}
BFLOAT16 = np.dtype("V2")  # how MLX writes it, since NumPy has none
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def write_npz(path: Path, outputs: Iterable[Output]) -> None:
    """Write an npz file for `mx.load`; bfloat16 as MLX writes it, two raw bytes per element."""
    # Given a path, ZipFile would close the file twice after a full disk, with a second error.
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for output in outputs:
            # A new ZipInfo has a fixed date, so equal tensors make equal files.
            with archive.open(
                zipfile.ZipInfo(f"{output.name}.npy"), "w", force_zip64=True
            ) as member:
                member.write(_header_bytes(output))
                for block in output.blocks:
                    member.write(output.raw(block))


def open_npz(path: Path) -> dict[str, LazyTensor]:
    """Find the tensors of an npz file without reading them; compressed ones are read.

    Raises:
        InputError: the file is missing, truncated or not an npz file.
    """
    with open_plain(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = check_members(archive, path)
                return {_name(info): _opened(path, archive, file, info) for info in members}
        except Exception as error:  # zipfile, NumPy and its parser of headers fail in many ways
            raise InputError(
                f"{path} is truncated or not an npz file ({one_line(error)}); fetch it again"
            ) from error


def load_npz(path: Path) -> dict[str, mx.array]:
    """The arrays of an npz file. Checksums are compared, and a header cannot cost memory.

    `mx.load` reads npz files in threads that call back into Python: a wrong checksum there ends the
    process, and so can an interpreter that exits soon after.

    Raises:
        Exception: the file is damaged; the type depends on how. Callers turn it into an
            `InputError`.
    """
    with zipfile.ZipFile(path) as archive:
        return {_name(info): _loaded(archive, info) for info in check_members(archive, path)}


class _Header(NamedTuple):
    """The header of one array: its type, its shape, and how many bytes come before its numbers."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    columns_first: bool
    length: int

    @property
    def strides(self) -> tuple[int, ...]:
        strides = contiguous_strides(self.shape[::-1] if self.columns_first else self.shape)
        return strides[::-1] if self.columns_first else strides


def _read_header(member: IO[bytes], info: zipfile.ZipInfo) -> _Header:
    version = np.lib.format.read_magic(member)
    if version not in _HEADER_READERS:
        raise ValueError(f"{info.filename} has version {version}")
    shape, columns_first, dtype = _HEADER_READERS[version](member)
    if dtype.hasobject or dtype.byteorder == ">":
        raise ValueError(f"{info.filename} holds {dtype}, not little-endian numbers")
    check_shape(shape)
    expected, actual = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    if expected != actual:
        raise ValueError(f"{info.filename} is {dtype} in shape {shape} and has {actual} bytes")
    return _Header(dtype, shape, columns_first, member.tell())


def _name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _opened(
    path: Path, archive: zipfile.ZipFile, file: BinaryIO, info: zipfile.ZipInfo
) -> LazyTensor:
    if info.compress_type != zipfile.ZIP_STORED:
        return ComputedTensor(_loaded(archive, info))
    with archive.open(info) as member:
        header = _read_header(member, info)
    dtype = mx.bfloat16 if header.dtype == BFLOAT16 else _DTYPES[header.dtype.str[1:]]
    start = data_offset(file, info) + header.length
    return StoredTensor(path, start, dtype, header.shape, header.strides)


def _loaded(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> mx.array:
    with archive.open(info) as member:
        dtype, shape, columns_first, _ = _read_header(member, info)
        content = member.read()  # to the end, where the checksum is compared
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if columns_first else "C")
    array = np.ascontiguousarray(array).reshape(shape)
    if dtype == BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _header_bytes(output: Output) -> bytes:
    kinds = {mx.bool_: "|b1", mx.uint8: "|u1", mx.int8: "|i1", mx.bfloat16: "<V2"}
    name = str(output.dtype).removeprefix("mlx.core.")
    descr = kinds[output.dtype] if output.dtype in kinds else np.dtype(name).str
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": output.shape}
    )
    return header.getvalue()
