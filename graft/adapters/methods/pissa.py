"""PiSSA: LoRA that starts from the principal components of the weight."""

from graft.adapters.adapted_layer import FactorPair
from graft.adapters.methods import SINGLE_MATRIX_KINDS, Method, register_method
from graft.adapters.methods.lora import started_formula
from graft.adapters.svd import truncated_svd

import mlx.core as mx


def pissa_start(weight: mx.array, rank: int, scale: float) -> FactorPair:
    """The principal part of a matrix, divided evenly: A = U sqrt(S / scale), B = sqrt(S / scale) V.

    Args:
        weight: (inputs, outputs).
        rank: how many singular values to take.
        scale: the scale of the update.

    Reference: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
    Large Language Models" (2024), https://arxiv.org/abs/2404.02948, equations 2 and 3.
    """
    u, s, vt = truncated_svd(weight, rank)
    root = mx.sqrt(s / scale)
    return u * root, root[:, None] * vt


register_method(
    "pissa",
    Method(
        formula=started_formula(pissa_start),
        kinds=SINGLE_MATRIX_KINDS,
        text="LoRA that starts from the weight's principal components",
        divides_by_scale=True,
        low_rank=True,
        keeps_start=True,
    ),
)
