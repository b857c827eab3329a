"""The adapters of llama.cpp in 2023, before GGUF: a header of 16 bytes, then tensor after tensor.

Reference: `convert-lora-to-ggml.py` and `llama_apply_lora_from_file_internal` in
https://github.com/ggml-org/llama.cpp/tree/b1500
"""

import math
import struct
from pathlib import Path
from typing import Any

from graft.adapters.factors import INTERLEAVED, Adapter, Product, from_products, paired
from graft.adapters.formats.gguf import to_mlx_name
from graft.adapters.formats.npz import new_name
from graft.errors import InputError, first_line

import mlx.core as mx
import numpy as np

MAGIC = struct.pack("<I", 0x67676C61)
ENDS = {".weight.loraA": "a", ".weight.loraB": "b"}
TYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}


def read_ggla(path: Path) -> Adapter:
    """A ggla file.

    Raises:
        InputError: the file is damaged, of another version or no adapter.
    """
    try:
        content = memoryview(path.read_bytes())
        magic, version, rank, alpha = struct.unpack("<IIii", content[:16])
        if struct.pack("<I", magic) != MAGIC or version != 1 or rank < 1:
            raise ValueError(f"magic {magic:#x}, version {version}, rank {rank}")
        tensors = _tensors(content)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a fuzzed file finds every branch
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error
    pairs, others = paired(tensors, ENDS)
    names = {n: to_mlx_name(n, "llama") or new_name(n) for n in pairs}
    others += [name for name, ours in names.items() if ours == name]
    if others or not pairs:
        raise InputError(f"{path} holds what Graft does not know: {', '.join(others) or 'nothing'}")
    found = {
        names[n]: Product("linear", halves["a"], halves["b"].T, float(alpha))
        for n, halves in pairs.items()
    }
    ranks = {p.rank for p in found.values()}
    if ranks != {rank}:
        raise InputError(f"{path} tells of rank {rank} and holds {', '.join(map(str, ranks))}")
    return from_products(found, rotary=INTERLEAVED)


def _tensors(content: memoryview) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
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
        dtype = TYPES[kind]
        size = math.prod(shape) * dtype.itemsize
        if min(shape) < 1 or position + size > len(content) or name in found:
            raise ValueError(f"{name!r} of shape {shape} ends behind the file, or occurs twice")
        array = np.frombuffer(content[position : position + size], dtype).reshape(shape)
        found[name] = mx.array(array)
        position += size
    return found
