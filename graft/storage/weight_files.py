"""Writes npz and safetensors files piece by piece, and finds what a safetensors file holds.

MLX's own writers want all arrays at once; these take them as they come, so that a file may be
larger than memory. Knows nothing of models.

Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html,
https://github.com/huggingface/safetensors#format
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graft.errors import InputError
from graft.storage.lazy_tensors import ComputedTensor, LazyTensor, StoredTensor, contiguous_strides

import mlx.core as mx
import numpy as np

_SAFETENSORS_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.float64: "F64",
}
# MLX has no eight-bit floats: it loads them as bytes, and the model classes take it from there.
_SAFETENSORS_DTYPES = {
    **{name: dtype for dtype, name in _SAFETENSORS_NAMES.items()},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), mx.uint8),
}
_NUMPY_DTYPES = {
    np.dtype(str(dtype).removeprefix("mlx.core.")).str[1:]: dtype
    for dtype in _SAFETENSORS_NAMES
    if dtype not in (mx.bool_, mx.bfloat16)
}


class Output(NamedTuple):
    """A tensor to write: what it is, and its rows in order, made only when they are written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    blocks: Iterator[mx.array]

    @property
    def size_bytes(self) -> int:
        """Bytes that the elements take."""
        return math.prod(self.shape) * self.dtype.size


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
                    member.write(_raw(block, output))


def write_safetensors(path: Path, outputs: Sequence[Output]) -> None:
    """Write a safetensors file, marked as MLX's."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for output in outputs:
        stop = start + output.size_bytes
        header[output.name] = {
            "dtype": _SAFETENSORS_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            for block in output.blocks:
                file.write(_raw(block, output))


def read_safetensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file that was just written."""
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a safetensors file without reading them.

    Raises:
        InputError: the file is missing, cut off or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"header to byte {8 + length}, file of {size} bytes")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _located(path, 8 + length, entry, size) for name, entry in entries.items()}
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"{path} is truncated or no safetensors file ({error}); fetch it again"
        ) from error


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
        kind = mx.bfloat16 if dtype == np.dtype("V2") else _NUMPY_DTYPES[dtype.str[1:]]
        if info.compress_type != zipfile.ZIP_STORED:
            array = mx.array(np.frombuffer(member.read(), np.uint8)).view(kind)
            return ComputedTensor(array.reshape(shape))
    file.seek(info.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    start += info.header_offset + 30 + name_bytes + extra_bytes
    return StoredTensor(path, start, kind, shape, contiguous_strides(shape))


def _located(path: Path, data_start: int, entry: dict[str, Any], file_bytes: int) -> StoredTensor:
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= file_bytes - data_start:
        raise ValueError(f"data to byte {data_start + stop}, file of {file_bytes} bytes")
    if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.size:
        raise ValueError(f"{stop - start} bytes for shape {list(shape)} of {entry['dtype']}")
    return StoredTensor(path, data_start + start, dtype, shape, contiguous_strides(shape))


def _npy_header(output: Output) -> bytes:
    kinds = {mx.bool_: "|b1", mx.uint8: "|u1", mx.int8: "|i1", mx.bfloat16: "<V2"}
    name = str(output.dtype).removeprefix("mlx.core.")
    descr = kinds[output.dtype] if output.dtype in kinds else np.dtype(name).str
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": output.shape}
    )
    return header.getvalue()


def _raw(block: mx.array, output: Output) -> memoryview:
    # The header is written by then: other bytes would be read as other numbers.
    assert block.dtype == output.dtype, f"{output.name}: {block.dtype}, not {output.dtype}"
    return memoryview(block.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]
