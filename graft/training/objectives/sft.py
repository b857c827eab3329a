"""Supervised fine-tuning: cross-entropy of the next token.

    loss = sum_t m_t (logsumexp(z_t) - z_t[y_t]) / sum_t m_t

with logits z_t, target y_t and loss mask m_t of token t.
"""

from graft.training.objectives import BatchArrays
from graft.training.packing import forward

import mlx.core as mx
import mlx.nn as nn


def objective(
    model: nn.Module, batch: BatchArrays
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """Cross-entropy summed over the tokens of the loss mask.

    Args:
        model: maps token ids (rows, tokens) to logits (rows, tokens, vocabulary).
        batch: `inputs` (rows, tokens) token ids, `targets` (rows, tokens) the ids that follow,
            `loss_mask` (rows, tokens) bool, and `segment_ids` (rows, tokens) if rows are packed.

    Returns:
        The summed loss in nats, the number of tokens in the loss mask, and no metrics.
    """
    if (head := getattr(model, "loss_head", None)) is not None:
        total = head.cross_entropy(model, batch)
    else:
        logits = forward(model, batch["inputs"], batch.get("segment_ids")).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, batch["targets"])
        total = (losses * batch["loss_mask"]).sum()
    return total, batch["loss_mask"].sum(), {}
