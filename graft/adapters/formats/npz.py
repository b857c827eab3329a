"""Adapters of the MLX LoRA example: an npz file with A and B, and nothing about them.

Until January 2024 it named layers as Meta does and scaled every update by 2; since then it names
them as Hugging Face does and scales by 20.

Reference: https://github.com/ml-explore/mlx-examples/tree/main/lora
"""

import re
from pathlib import Path

from graft.adapters.factors import (
    INTERLEAVED,
    Adapter,
    Product,
    alpha_for,
    from_products,
    guess_kind,
    paired,
)
from graft.adapters.layer_config import LayerConfig
from graft.errors import InputError
from graft.storage.tensor_file import read_tensor_file

OLD_SCALE, NEW_SCALE = 2.0, 20.0
OLD_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
OLD_TOP_NAMES = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
ENDS = {".lora_a": "a", ".lora_b": "b"}


def read_npz(path: Path, *, alpha: float | None = None) -> Adapter:
    """An npz file without a record, of either generation.

    Args:
        path: the file.
        alpha: numerator of the scale; by default the scale is the one of the file's generation.

    Raises:
        InputError: the file is damaged, or no adapter.
    """
    pairs, others = paired(read_tensor_file(path), ENDS)
    if others or not pairs:
        what = f"has tensors that are no lora_a or lora_b: {', '.join(others)}"
        raise InputError(f"{path} {what if others else 'holds no lora_a and lora_b'}")
    old = any(path.startswith("layers.") or path in OLD_TOP_NAMES for path in pairs)
    scale = OLD_SCALE if old else NEW_SCALE
    found = {}
    for name, halves in pairs.items():
        layer = new_name(name)
        a, b = halves["a"], halves["b"]
        kind = guess_kind(layer, LayerConfig(1, 1.0), a)
        product = Product(kind, a, b, 1.0)
        rank = product.rank if b.ndim > 1 else 1
        found[layer] = Product(kind, a, b, alpha_for(scale, rank) if alpha is None else alpha)
    ranks = sorted({product.rank for product in found.values() if product.b.ndim > 1})
    taken = f"scale {scale:g}, the default of its time" if alpha is None else f"alpha {alpha:g}"
    generation = "before 2024, with Meta's names" if old else "since 2024"
    note = (
        f"{path} has no record: taken for the MLX example's ({generation}), rank "
        f"{', '.join(map(str, ranks))} from the shapes, {taken}"
    )
    return from_products(found, rotary=INTERLEAVED if old else None, notes=(note,))


def new_name(name: str) -> str:
    """Hugging Face's name for a layer that Meta's layout, or Hugging Face's, names."""
    if name in OLD_TOP_NAMES:
        return OLD_TOP_NAMES[name]
    match = re.fullmatch(r"layers\.(\d+)\.(\w+\.\w+)", name)
    if match and match[2] in OLD_NAMES:
        return f"model.layers.{match[1]}.{OLD_NAMES[match[2]]}"
    return name
