"""OLoRA: LoRA that starts from a QR decomposition of the weight."""

from graft.adapters.adapted_layer import FactorPair
from graft.adapters.methods import SINGLE_MATRIX_KINDS, Method, register_method
from graft.adapters.methods.lora import started_formula

import mlx.core as mx


def olora_start(weight: mx.array, rank: int, scale: float) -> FactorPair:
    """The first directions of the QR decomposition of the transpose, Q R: A = R^T, B = Q^T.

    Args:
        weight: (inputs, outputs).
        rank: how many directions to take.
        scale: the scale of the update; A and B do not depend on it.

    Reference: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (2024),
    https://arxiv.org/abs/2406.01775.
    """
    q, r = mx.linalg.qr(weight.T, stream=mx.cpu)
    return r[:rank].T, q[:, :rank].T


register_method(
    "olora",
    Method(
        formula=started_formula(olora_start),
        kinds=SINGLE_MATRIX_KINDS,
        text="LoRA that starts from a QR decomposition of the weight",
        low_rank=True,
        keeps_start=True,
    ),
)
