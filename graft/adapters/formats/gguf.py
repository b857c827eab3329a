"""llama.cpp's GGUF files of an adapter.

llama.cpp scales every update by alpha / rank of its tensors, or by 1 where alpha is 0. It stores
the rows of q and k of Llama's relatives interleaved, so their updates are interleaved too.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py, src/
llama-adapter.cpp there, and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from graft.adapters.factors import (
    HALVES,
    INTERLEAVED,
    Adapter,
    Product,
    from_products,
    paired,
    products,
)
from graft.adapters.rotary import reordered
from graft.errors import InputError, first_line
from graft.pretrained.base_config import BaseModel
from graft.storage.atomic import check_free, new_file

import mlx.core as mx
import numpy as np

MAGIC = b"GGUF"
ENDS = {".weight.lora_a": "a", ".weight.lora_b": "b"}
KINDS = ("linear", "embedding", "embedding-input", "experts")

# mlx-lm's architecture -> llama.cpp's.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
# Those whose q and k llama.cpp's converter interleaves.
INTERLEAVING = ("llama", "granite", "smollm3")

# Part of a block -> llama.cpp's name for it.
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_BLOCK_NAMES = {
    "mixtral": {
        f"block_sparse_moe.switch_mlp.{name}_proj": f"ffn_{name}_exps"
        for name in ("gate", "up", "down")
    },
    "qwen2_moe": {f"mlp.switch_mlp.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
    "qwen3_moe": {f"mlp.switch_mlp.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "starcoder2": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "lm_head": "output"}


def names_of(architecture: str) -> dict[str, str]:
    """From parts of a block to llama.cpp's names, for one of mlx-lm's architectures."""
    own = OTHER_BLOCK_NAMES.get(architecture, {})
    return {n: g for n, g in BLOCK_NAMES.items() if g not in own.values()} | own


# ---- reading ---------------------------------------------------------------------------------
#
# Not with the gguf package's reader: it believes the counts in the header, and a file of 100 bytes
# can keep it busy for ever.


class Field(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    type: int
    offset: int


SCALARS = {
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
STRING, ARRAY = 8, 9
F32, F16, BF16 = 0, 1, 30


class _Bytes:
    """A file's bytes, taken one after the other."""

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
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            least = 8 if inner == STRING else struct.calcsize(f"<{SCALARS[inner]}")
            if count * least > len(self.content) - self.position:
                raise ValueError(f"a list of {count} at byte {self.position}")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read_header(content: memoryview) -> tuple[dict[str, Any], dict[str, Field]]:
    """Metadata and tensors of a GGUF file.

    Raises:
        ValueError: it is none, or ends early. Other errors of a broken file may come too.
    """
    file = _Bytes(content)
    version = (bytes(file.take(4)), file.scalar("I"))
    if version not in ((MAGIC, 2), (MAGIC, 3)):
        raise ValueError(f"it begins with {version}, not with GGUF version 2 or 3")
    tensors, pairs = file.scalar("Q"), file.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        name = file.string()
        metadata[name] = file.value(file.scalar("I"))
    found: dict[str, Field] = {}
    for _ in range(tensors):
        name, dimensions = file.string(), file.scalar("I")
        if dimensions > 4 or name in found:
            raise ValueError(f"tensor {name!r} occurs twice or has {dimensions} dimensions")
        shape = tuple(reversed([file.scalar("Q") for _ in range(dimensions)]))
        found[name] = Field(shape, file.scalar("I"), file.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment {alignment!r}")
    start = -(-file.position // alignment) * alignment
    return metadata, {n: f._replace(offset=f.offset + start) for n, f in found.items()}


def _tensor(content: memoryview, name: str, field: Field) -> mx.array:
    count = math.prod(field.shape)
    if field.type in (F32, F16, BF16):
        size = count * (4 if field.type == F32 else 2)
        if field.offset + size > len(content):
            raise ValueError(f"{name} ends behind the file")
        raw = content[field.offset : field.offset + size]
        dtype = {F32: np.float32, F16: np.float16, BF16: np.uint16}[field.type]
        array = mx.array(np.frombuffer(raw, dtype).reshape(field.shape))
        return array.view(mx.bfloat16) if field.type == BF16 else array
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(field.type)
    elements, block_bytes = GGML_QUANT_SIZES[kind]
    size = count // elements * block_bytes
    if not field.shape or field.shape[-1] % elements or field.offset + size > len(content):
        raise ValueError(f"{name} ends behind the file, or within a block")
    packed = np.frombuffer(content[field.offset : field.offset + size], np.uint8)
    rows = packed.reshape(*field.shape[:-1], field.shape[-1] // elements * block_bytes)
    return mx.array(dequantize(rows, kind))


def read_gguf(path: Path) -> Adapter:
    """A GGUF file of an adapter.

    Raises:
        InputError: the file is damaged, or no LoRA adapter of an architecture that is known.
    """
    try:
        with path.open("rb") as file:
            content = memoryview(file.read())
        metadata, fields = read_header(content)
        size = sum(4 * math.prod(field.shape) for field in fields.values())
        if size > 16 * len(content):
            raise ValueError(f"{size} bytes of tensors in a file of {len(content)}")
        tensors = {name: _tensor(content, name, field) for name, field in fields.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a fuzzed file finds every branch
        raise InputError(f"{path} is damaged or incomplete: {first_line(error)}") from error
    kinds = (metadata.get("general.type"), metadata.get("adapter.type", "lora"))
    if kinds != ("adapter", "lora"):
        raise InputError(f"{path} is a {kinds[0]} of type {kinds[1]}, not an adapter of type lora")
    theirs = metadata.get("general.architecture")
    known = next((ours for ours, name in ARCHITECTURES.items() if name == theirs), None)
    if known is None:
        raise InputError(
            f"{path}: architecture {theirs!r}; Graft knows {', '.join(set(ARCHITECTURES.values()))}"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float):
        raise InputError(f"{path}: adapter.lora.alpha {alpha!r} is no number")
    pairs, others = paired(tensors, ENDS)
    names = {name: to_mlx_name(name, known) for name in pairs}
    others += [name for name, ours in names.items() if ours is None]
    if others or not pairs:
        raise InputError(f"{path} holds what Graft does not know: {', '.join(others) or 'nothing'}")
    base = metadata.get("general.base_model.0.name")
    return from_products(
        {str(names[name]): from_llama_cpp(name, halves, alpha) for name, halves in pairs.items()},
        base_model=base if isinstance(base, str) else None,
        rotary=INTERLEAVED if theirs in INTERLEAVING else HALVES,
    )


def to_mlx_name(name: str, architecture: str) -> str | None:
    """mlx-lm's path for llama.cpp's name."""
    ours = {theirs: own for own, theirs in TOP_NAMES.items()}
    if name in ours:
        return ours[name]
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    # Experts have the same names in all architectures but not the same paths.
    inside = {theirs: own for own, theirs in names_of(architecture).items()}
    if architecture == "llama":
        inside |= {theirs: own for own, theirs in OTHER_BLOCK_NAMES["mixtral"].items()}
    if block is None or block[2] not in inside:
        return None
    return f"model.layers.{int(block[1])}.{inside[block[2]]}"


def from_llama_cpp(name: str, halves: dict[str, mx.array], alpha: float) -> Product:
    """A and B of one layer: (rank, in) and (out, rank), or an embedding's (vocabulary, rank)."""
    a, b = halves["a"], halves["b"]
    if a.ndim == 3:
        product = Product("experts", a, b, 1.0)
    elif name == "token_embd":
        product = Product("embedding-input", a, b.T, 1.0)
    else:
        product = Product("linear", a.T, b.T, 1.0)
    ranked = product.b.ndim > 1 and product.rank
    return replace(product, alpha=float(alpha) or float(ranked or 1))


# ---- writing ---------------------------------------------------------------------------------


def write_gguf(
    adapter: Adapter, out: Path, *, base: BaseModel | None = None, force: bool = False
) -> list[str]:
    """Write a GGUF file that llama.cpp loads; returns what was changed to fit, a line each.

    Raises:
        InputError: layers that llama.cpp has no adapter for, an architecture that is not known, or
            a place that cannot be written.
    """
    if base is None:
        raise InputError("GGUF tells the architecture: name the base model with --model")
    architecture = ARCHITECTURES.get(base.architecture)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"GGUF for {base.architecture}: Graft knows the names of {known}")
    if architecture in INTERLEAVING:
        adapter = replace(adapter, rotary=adapter.rotary or base.rotary)
        adapter = reordered(adapter, INTERLEAVED, base.heads)
    found = products(adapter, target="GGUF", kinds=KINDS)
    names = {path: _to_llama_cpp_name(path, base.architecture) for path in found}
    unknown = [path for path, name in names.items() if name is None]
    tied = [p for p, product in found.items() if base.tied and product.kind == "embedding"]
    tied += [path for path in found if path == "lm_head" and base.tied]
    if unknown or tied:
        raise InputError(f"GGUF cannot hold these layers: {', '.join(unknown + tied)}")
    found, alpha, notes = _one_alpha(found)
    if out.exists() and not force:
        check_free(out, replace=False)
    tensors: dict[str, mx.array] = {}
    for path, product in found.items():
        a, b = _to_llama_cpp(product)
        tensors |= {f"{names[path]}.weight.lora_a": a, f"{names[path]}.weight.lora_b": b}
    with new_file(out) as temporary:
        _save(temporary, tensors, architecture=architecture, alpha=alpha, base=adapter.base_model)
    return notes


def _to_llama_cpp_name(path: str, architecture: str) -> str | None:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    name = names_of(architecture).get(block[2]) if block else None
    return TOP_NAMES.get(path) if block is None else name and f"blk.{block[1]}.{name}"


def _one_alpha(found: dict[str, Product]) -> tuple[dict[str, Product], float, list[str]]:
    """The same updates with one alpha, which llama.cpp divides by each layer's rank."""
    alphas = Counter(p.scale * p.rank if p.rank_stabilized else p.alpha for p in found.values())
    alpha = float(np.float32(alphas.most_common(1)[0][0]))
    if alpha == 0:
        raise InputError("most layers have alpha 0, which llama.cpp takes for a scale of 1")
    scaled = {path: product.scaled(alpha / product.rank) for path, product in found.items()}
    folded = [path for path, product in found.items() if product.scale != alpha / product.rank]
    note = f"folded into B, for one alpha of {alpha:g}: {len(folded)} layers"
    return scaled, alpha, [note] if folded else []


def _to_llama_cpp(product: Product) -> tuple[mx.array, mx.array]:
    if product.kind == "experts":
        return product.a, product.b
    return product.a if product.kind.startswith("embedding") else product.a.T, product.b.T


def _save(
    path: Path, tensors: dict[str, mx.array], *, architecture: str, alpha: float, base: str | None
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    for name, array in tensors.items():
        writer.add_tensor(name, np.array(mx.contiguous(array.astype(mx.float32))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
