"""llama.cpp's GGUF files of an adapter.

llama.cpp scales every update by alpha / rank of its tensors, or by 1 if alpha is 0. It stores the
rows of q and k of Llama and its relatives interleaved, so their updates are interleaved too.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py and
src/llama-adapter.cpp there
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from graft.adapters.adapter import Adapter, reordered
from graft.adapters.factors import Factors, factors_of, from_factors, from_matrices, paired
from graft.adapters.formats import Format, Usage, register_format
from graft.adapters.layer_kinds import EMBEDDING, EMBEDDING_INPUT, EXPERTS, LINEAR
from graft.errors import InputError
from graft.pretrained.architectures import (
    ARCHITECTURES,
    HALVES,
    INTERLEAVED,
    LlamaCppNames,
    find_architecture,
)
from graft.pretrained.base_config import BaseConfig
from graft.storage.atomic import check_free, new_file
from graft.storage.gguf_file import GGUF_MAGIC, read_gguf_file, write_lora_gguf

import mlx.core as mx
import numpy as np

_SUFFIXES = {".weight.lora_a": "a", ".weight.lora_b": "b"}
_KINDS = (LINEAR, EMBEDDING, EMBEDDING_INPUT, EXPERTS)
_TOP_NAMES = {"model.embed_tokens": "token_embd", "lm_head": "output"}


# ---- reading ---------------------------------------------------------------------------------


def read_gguf(path: Path) -> Adapter:
    """A GGUF file of an adapter.

    Raises:
        InputError: the file is damaged, or not a LoRA adapter of a known architecture.
    """
    metadata, tensors = read_gguf_file(path)
    contents = (metadata.get("general.type"), metadata.get("adapter.type", "lora"))
    if contents != ("adapter", "lora"):
        raise InputError(
            f"{path} is a {contents[0]} of type {contents[1]}, not an adapter of type lora"
        )
    name = metadata.get("general.architecture")
    if name not in (known := _by_llama_cpp_name()):
        raise InputError(f"{path}: architecture {name!r}; Graft knows {', '.join(known)}")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float):
        raise InputError(f"{path}: adapter.lora.alpha {alpha!r} is not a number")
    pairs, unknown = paired(tensors, _SUFFIXES)
    paths = {layer: to_mlx_name(layer, name) for layer in pairs}
    unknown += [layer for layer, mlx_name in paths.items() if mlx_name is None]
    if unknown or not pairs:
        raise InputError(
            f"{path} holds tensors that Graft does not know: {', '.join(unknown) or 'none at all'}"
        )
    base = metadata.get("general.base_model.0.name")
    return from_factors(
        {str(paths[n]): _from_llama_cpp(n, halves, alpha) for n, halves in pairs.items()},
        base_model=base if isinstance(base, str) else None,
        rotary=INTERLEAVED if any(names.interleaves for names in known[name]) else HALVES,
    )


def _by_llama_cpp_name() -> dict[str, list[LlamaCppNames]]:
    """From llama.cpp's name of an architecture to the names that it may use for layers."""
    known: dict[str, list[LlamaCppNames]] = {}
    for quirks in ARCHITECTURES.values():
        if quirks.llama_cpp is not None:
            known.setdefault(quirks.llama_cpp.architecture, []).append(quirks.llama_cpp)
    return known


def to_mlx_name(name: str, architecture: str) -> str | None:
    """mlx-lm's path for llama.cpp's name of a layer; `None` if it is not known.

    Args:
        name: such as `blk.3.attn_q`.
        architecture: llama.cpp's name. Several of mlx-lm's may share it, as Llama and Mixtral do.
    """
    for path, top_name in _TOP_NAMES.items():
        if name == top_name:
            return path
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    for names in _by_llama_cpp_name()[architecture]:
        for path, block_name in names.block.items():
            if block is not None and block[2] == block_name:
                return f"model.layers.{int(block[1])}.{path}"
    return None


def _from_llama_cpp(name: str, halves: Mapping[str, mx.array], alpha: float) -> Factors:
    """A and B of one layer: (..., rank, in) and (..., out, rank), or an embedding's (vocab, rank).

    Raises:
        InputError: A or B is not a matrix.
    """
    a, b = halves["a"], halves["b"]
    if min(a.ndim, b.ndim) < 2:
        raise InputError(f"{name}: A of shape {a.shape} and B of shape {b.shape} are not matrices")
    is_embedding = name == _TOP_NAMES["model.embed_tokens"]
    kind = EXPERTS if a.ndim == 3 else EMBEDDING_INPUT if is_embedding else LINEAR
    a = a if kind.takes_ids else a.swapaxes(-1, -2)
    factors = from_matrices(kind, a, b.swapaxes(-1, -2))
    # Without an alpha, the scale is 1.
    return replace(factors, alpha=float(alpha)) if alpha else factors


# ---- writing ---------------------------------------------------------------------------------


def write_gguf(
    adapter: Adapter, out: Path, *, base: BaseConfig | None = None, force: bool = False
) -> list[str]:
    """Write a GGUF file that llama.cpp loads; returns what was changed to fit, a line each.

    Raises:
        InputError: layers that llama.cpp has no adapter for, an architecture that is not known, or
            a path that cannot be written.
    """
    if base is None:
        raise InputError("a GGUF file records the architecture: name the base model with --model")
    names = find_architecture(base.architecture).llama_cpp
    if names is None:
        known = ", ".join(name for name, quirks in ARCHITECTURES.items() if quirks.llama_cpp)
        raise InputError(f"GGUF for {base.architecture}: Graft knows the names of {known}")
    if names.interleaves:
        adapter = replace(adapter, rotary=adapter.rotary or base.rotary)
        adapter = reordered(adapter, INTERLEAVED, base.heads)
    factors = factors_of(adapter, holder="GGUF", kinds=_KINDS)
    layer_names = {path: _to_llama_cpp_name(path, names) for path in factors}
    refused = [path for path, name in layer_names.items() if name is None]
    if base.tied:
        refused += [p for p, f in factors.items() if p == "lm_head" or f.kind is EMBEDDING]
    if refused:
        raise InputError(f"GGUF cannot hold these layers: {', '.join(refused)}")
    factors, alpha, notes = _with_one_alpha(factors)
    if out.exists() and not force:
        check_free(out, replace=False)
    tensors: dict[str, mx.array] = {}
    for path, layer in factors.items():
        a, b = _to_llama_cpp(layer)
        name = layer_names[path]
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    with new_file(out) as temporary:
        write_lora_gguf(
            temporary,
            tensors,
            architecture=names.architecture,
            alpha=alpha,
            base_model=adapter.base_model,
        )
    return notes


def _to_llama_cpp_name(path: str, names: LlamaCppNames) -> str | None:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if block is None:
        return _TOP_NAMES.get(path)
    name = names.block.get(block[2])
    return None if name is None else f"blk.{block[1]}.{name}"


def _with_one_alpha(factors: dict[str, Factors]) -> tuple[dict[str, Factors], float, list[str]]:
    """The same updates with one alpha, which llama.cpp divides by each layer's rank."""
    alphas = Counter(
        layer.scale * layer.rank if layer.rank_stabilized else layer.alpha
        for layer in factors.values()
    )
    alpha = float(np.float32(alphas.most_common(1)[0][0]))
    if alpha == 0:
        raise InputError("most layers have alpha 0, which llama.cpp reads as a scale of 1")
    scaled = {path: layer.at_scale(alpha / layer.rank) for path, layer in factors.items()}
    folded = sum(layer.scale != alpha / layer.rank for layer in factors.values())
    note = f"folded into B, for one alpha of {alpha:g}: {folded} layers"
    return scaled, alpha, [note] if folded else []


def _to_llama_cpp(factors: Factors) -> tuple[mx.array, mx.array]:
    """A and B in llama.cpp's layout, as `_from_llama_cpp` takes them."""
    a, b = (factors.kind.as_matrix(array) for array in (factors.a, factors.b))
    return a if factors.kind.takes_ids else a.swapaxes(-1, -2), b.swapaxes(-1, -2)


register_format(
    Format(
        name="gguf",
        files=("*.gguf",),
        suffix=".gguf",
        magic=GGUF_MAGIC,
        read=lambda path, alpha: read_gguf(path),
        write=write_gguf,
        usage=Usage(
            "llama.cpp",
            "gguf",
            """\
```console
$ llama-cli -m base.gguf --lora {file} -p "Hello"
```

where `base.gguf` is {base} in GGUF.""",
        ),
    )
)
