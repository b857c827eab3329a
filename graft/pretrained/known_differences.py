"""Says where mlx-lm computes something else than transformers with the same weights.

Found by comparing the two on small random models. Knows configurations only.
"""

import math
from collections.abc import Mapping
from typing import Any

from graft.errors import InputError

import mlx.nn as nn


def check_differences(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The differences that concern some inputs only, a line each.

    Args:
        model: the architecture as mlx-lm builds it.
        config: its configuration.

    Raises:
        InputError: the model would compute something else for all inputs.
    """
    name = config.get("model_type")
    rotated = config.get("partial_rotary_factor")
    if name == "glm" and rotated not in (None, 1, 1.0):
        raise InputError(
            f"mlx-lm's glm rotates all dimensions of a head, and this model {rotated} of them "
            "(partial_rotary_factor): its answers would be wrong"
        )
    notes = []
    if (window := _ignored_window(model, config)) is not None:
        notes.append(
            f"mlx-lm's {name} has no sliding window: beyond {window:,} tokens a text is computed "
            "otherwise than in transformers"
        )
    if name == "jamba" and config.get("num_experts_per_tok", 2) > 1:
        notes.append(
            "mlx-lm's jamba scales the weights of a token's experts to a sum of 1, transformers "
            "does not: their answers differ"
        )
    return notes


def _ignored_window(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """The sliding window of a configuration, if it is shorter than the context and not applied."""
    window = config.get("sliding_window")
    if type(window) is not int or not config.get("use_sliding_window", True):
        return None
    if window >= (config.get("max_position_embeddings") or math.inf):
        return None
    args = getattr(model, "args", None)
    kinds = getattr(args, "layer_types", None) or ()
    applied = hasattr(args, "sliding_window") and (
        config.get("model_type") not in ("llama", "mistral") or "sliding_attention" in kinds
    )
    return None if applied else window
