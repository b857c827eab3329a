"""LoftQ: LoRA that starts by correcting the quantization error of its base."""

from graft.adapters.layer_kinds import LAYER_KINDS
from graft.adapters.methods import Method, register_method
from graft.adapters.methods.lora import LOW_RANK_FORMULA
from graft.adapters.methods.pissa import pissa_start
from graft.models import LoRALayer, dense_weight

import mlx.core as mx


def loftq_start(layer: LoRALayer, original: mx.array) -> None:
    """Set A and B of a layer over a quantized base Q to the best correction of its rounding.

    scale * A B is the truncated SVD of W - Q, so the untrained layer is closer to the model before
    quantization. This is the first of the paper's alternating steps; the further ones would change
    Q, and the adapter would fit no other copy of the base. Li et al., "LoftQ:
    LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (2023),
    https://arxiv.org/abs/2310.08659, algorithm 1.

    Args:
        layer: an adapted layer with A and B.
        original: the weight before quantization.
    """
    flat = LAYER_KINDS[layer.kind].flat
    assert flat is not None
    rounding = original.astype(mx.float32) - dense_weight(layer.base).astype(mx.float32)
    a, b = pissa_start(flat(rounding), layer.rank, layer.scale)
    layer.load({"lora_a": a, "lora_b": b})


register_method(
    "loftq",
    Method(
        formula=LOW_RANK_FORMULA,
        kinds=("linear", "embedding"),
        text="LoRA that starts by correcting the base's quantization error",
        divides_by_scale=True,
        low_rank=True,
        start_from_original=loftq_start,
    ),
)
