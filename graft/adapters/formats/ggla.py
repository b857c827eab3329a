"""llama.cpp's adapter files of 2023, before GGUF: a header of 16 bytes, then the tensors.

Reference: `convert-lora-to-ggml.py` and `llama_apply_lora_from_file_internal` in
https://github.com/ggml-org/llama.cpp/tree/b1500
"""

import math
import struct
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter
from graft.adapters.factors import Factors, from_factors, paired
from graft.adapters.formats import Format, register_format
from graft.adapters.formats.gguf import to_mlx_name
from graft.adapters.layer_kinds import LINEAR
from graft.errors import InputError, first_line
from graft.pretrained.architectures import INTERLEAVED
from graft.pretrained.meta import path_from_meta
from graft.storage.plain_file import read_plain_bytes

import mlx.core as mx
import numpy as np

_MAGIC = struct.pack("<I", 0x67676C61)
_SUFFIXES = {".weight.loraA": "a", ".weight.loraB": "b"}
_TYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}


def read_ggla(path: Path) -> Adapter:
    """A ggla file.

    Raises:
        InputError: the file is damaged, of another version or not an adapter.
    """
    try:
        content = memoryview(read_plain_bytes(path))
        magic, version, rank, alpha = struct.unpack("<IIii", content[:16])
        if struct.pack("<I", magic) != _MAGIC or version != 1 or rank < 1:
            raise ValueError(f"magic {magic:#x}, version {version}, rank {rank}")
        tensors = _read_tensors(content)
    except InputError:
        raise
    except Exception as error:  # a fuzzed file finds every branch
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error
    pairs, unknown = paired(tensors, _SUFFIXES)
    names = {n: to_mlx_name(n, "llama") or path_from_meta(n) for n in pairs}
    unknown += [name for name, new in names.items() if new == name]
    if unknown or not pairs:
        raise InputError(
            f"{path} holds tensors that Graft does not know: {', '.join(unknown) or 'none at all'}"
        )
    factors = {
        names[name]: Factors(LINEAR, halves["a"], halves["b"].T, float(alpha))
        for name, halves in pairs.items()
    }
    ranks = {layer.rank for layer in factors.values()}
    if ranks != {rank}:
        raise InputError(f"{path} says rank {rank} and holds {', '.join(map(str, ranks))}")
    return from_factors(factors, rotary=INTERLEAVED)


def _read_tensors(content: memoryview) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    position = 16
    while position < len(content):
        dimensions, length, kind = struct.unpack_from("<iii", content, position)
        position += 12
        if not 1 <= dimensions <= 2 or length < 0:
            raise ValueError(f"{dimensions} dimensions, a name of {length} bytes")
        shape = struct.unpack_from(f"<{dimensions}i", content, position)[::-1]
        position += 4 * dimensions
        name = bytes(content[position : position + length]).decode()
        position = -(-(position + length) // 32) * 32
        dtype = _TYPES[kind]
        size = math.prod(shape) * dtype.itemsize
        if min(shape) < 1 or position + size > len(content) or name in tensors:
            raise ValueError(f"{name!r} of shape {shape} ends after the file, or occurs twice")
        array = np.frombuffer(content[position : position + size], dtype).reshape(shape)
        tensors[name] = mx.array(array)
        position += size
    return tensors


register_format(
    Format(
        name="ggla",
        files=("ggml-adapter-model.bin",),
        magic=_MAGIC,
        read=lambda path, alpha: read_ggla(path),
    )
)
