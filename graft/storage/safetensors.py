"""Reads and writes safetensors files, tensor by tensor.

MLX's own writer needs all arrays at once. This one writes each as it is made, so a file may be
larger than memory.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.console import one_line
from graft.errors import InputError
from graft.storage.json_file import parse_json
from graft.storage.lazy_tensors import (
    Output,
    StoredTensor,
    check_shape,
    contiguous_strides,
    size_bytes,
)
from graft.storage.plain_file import open_plain

import mlx.core as mx

_NAMES = {
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
# MLX has no 8-bit floats: it loads them as bytes, which `graft.storage.float8` decodes.
_DTYPES = {
    **{name: dtype for dtype, name in _NAMES.items()},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), mx.uint8),
}


def write_safetensors(path: Path, outputs: Sequence[Output]) -> None:
    """Write a safetensors file with MLX's metadata."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for output in outputs:
        stop = start + output.size_bytes
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
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
                file.write(output.raw(block))


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, which MLX reads when they are used."""
    arrays = mx.load(str(file), format="safetensors")
    assert isinstance(arrays, dict)
    return arrays


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a safetensors file without reading them.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file.
    """
    with open_plain(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"header to byte {8 + length}, file of {size} bytes")
            header = parse_json(file.read(length).decode())
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {
                name: _located(path, 8 + length, entry, size) for name, entry in entries.items()
            }
            if (total := sum(map(size_bytes, tensors.values()))) > size:
                raise ValueError(f"{total} bytes of tensors in a file of {size}")
            return tensors
        except Exception as error:  # a header can be any JSON
            raise InputError(
                f"{path} is truncated or not a safetensors file ({one_line(error)}); fetch it again"
            ) from error


def _located(path: Path, data_start: int, entry: dict[str, Any], file_bytes: int) -> StoredTensor:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not isinstance(start, int) or not isinstance(stop, int):
        raise ValueError("offsets that are not whole numbers")
    if not 0 <= start <= stop <= file_bytes - data_start:
        raise ValueError(f"data to byte {data_start + stop}, file of {file_bytes} bytes")
    check_shape(shape)
    if stop - start != math.prod(shape) * dtype.size:
        raise ValueError(f"{stop - start} bytes for shape {list(shape)} of {entry['dtype']}")
    float8 = entry["dtype"] if entry["dtype"].startswith("F8_") else ""
    return StoredTensor(path, data_start + start, dtype, shape, contiguous_strides(shape), float8)
