"""GGUF files: metadata and tensors, read without trusting the file, and written.

Not read with the gguf package's reader: it believes the counts in the header, and a file of 100
bytes can keep it busy forever.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graft.errors import InputError, first_line
from graft.storage.lazy_tensors import LARGEST_EXPANSION, check_shape
from graft.storage.plain_file import read_plain_bytes

import mlx.core as mx
import numpy as np

GGUF_MAGIC = b"GGUF"
# GGUF's types of metadata values -> struct's codes.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30


class GGUFField(NamedTuple):
    """Where a tensor is in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


class _Bytes:
    """The bytes of a file, read from front to back."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.content) - self.position:
            raise ValueError(f"{count} bytes at byte {self.position} of {len(self.content)}")
        self.position += count
        return self.content[self.position - count : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return bytes(self.take(self.scalar("Q"))).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            least = 8 if inner == _STRING else struct.calcsize(f"<{_SCALARS[inner]}")
            if count * least > len(self.content) - self.position:
                raise ValueError(f"a list of {count} at byte {self.position}")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def read_gguf_file(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Metadata and tensors of a GGUF file; quantized tensors are dequantized.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        content = memoryview(read_plain_bytes(path))
        metadata, fields = read_gguf_header(content)
        size = sum(4 * math.prod(field.shape) for field in fields.values())
        if size > LARGEST_EXPANSION * len(content):
            raise ValueError(f"{size} bytes of tensors in a file of {len(content)}")
        return metadata, {name: _tensor(content, name, field) for name, field in fields.items()}
    except InputError:
        raise
    except Exception as error:  # a fuzzed file finds every branch
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error


def read_gguf_header(content: memoryview) -> tuple[dict[str, Any], dict[str, GGUFField]]:
    """Metadata of a GGUF file, and where its tensors are.

    Raises:
        ValueError: it is not a GGUF file, or ends early. A damaged file may raise other errors.
    """
    file = _Bytes(content)
    version = (bytes(file.take(4)), file.scalar("I"))
    if version not in ((GGUF_MAGIC, 2), (GGUF_MAGIC, 3)):
        raise ValueError(f"it begins with {version}, not with GGUF version 2 or 3")
    tensor_count, pair_count = file.scalar("Q"), file.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        name = file.string()
        metadata[name] = file.value(file.scalar("I"))
    fields: dict[str, GGUFField] = {}
    for _ in range(tensor_count):
        name, dimensions = file.string(), file.scalar("I")
        if dimensions > 4 or name in fields:
            raise ValueError(f"tensor {name!r} occurs twice or has {dimensions} dimensions")
        shape = tuple(reversed([file.scalar("Q") for _ in range(dimensions)]))
        check_shape(shape)
        fields[name] = GGUFField(shape, file.scalar("I"), file.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment {alignment!r}")
    start = -(-file.position // alignment) * alignment
    return metadata, {n: f._replace(offset=f.offset + start) for n, f in fields.items()}


def _tensor(content: memoryview, name: str, field: GGUFField) -> mx.array:
    count = math.prod(field.shape)
    if field.type in (_F32, _F16, _BF16):
        size = count * (4 if field.type == _F32 else 2)
        if field.offset + size > len(content):
            raise ValueError(f"{name} ends after the file")
        raw = content[field.offset : field.offset + size]
        dtype = {_F32: np.float32, _F16: np.float16, _BF16: np.uint16}[field.type]
        array = mx.array(np.frombuffer(raw, dtype).reshape(field.shape))
        return array.view(mx.bfloat16) if field.type == _BF16 else array
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(field.type)
    elements, block_bytes = GGML_QUANT_SIZES[kind]
    size = count // elements * block_bytes
    if not field.shape or field.shape[-1] % elements or field.offset + size > len(content):
        raise ValueError(f"{name} ends after the file, or within a block")
    packed = np.frombuffer(content[field.offset : field.offset + size], np.uint8)
    rows = packed.reshape(*field.shape[:-1], field.shape[-1] // elements * block_bytes)
    return mx.array(dequantize(rows, kind))


def write_lora_gguf(
    path: Path,
    tensors: Mapping[str, mx.array],
    *,
    architecture: str,
    alpha: float,
    base_model: str | None,
) -> None:
    """Write the GGUF file of a LoRA adapter.

    Args:
        path: the file.
        tensors: by llama.cpp's names; written in float32.
        architecture: llama.cpp's name for it.
        alpha: of all layers.
        base_model: a name to record, if there is one.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if base_model is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_model)
    for name, array in tensors.items():
        writer.add_tensor(name, np.array(mx.contiguous(array.astype(mx.float32))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
