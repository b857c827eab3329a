"""Says where mlx-lm computes something else than transformers with the same weights.

Found by comparing the two on small random models. Knows configurations only.
"""

import math
from collections.abc import Mapping
from typing import Any

from graft.errors import InputError

import mlx.nn as nn

# mlx-lm leaves the weight of a token's expert as it is if there is one; transformers divides it
# by itself if `norm_topk_prob` is set.
_ONE_EXPERT_UNSCALED = (
    *("deepseek_v3", "dots1", "exaone_moe"),
    *("glm4_moe", "glm4_moe_lite", "nemotron_h"),
)


def check_differences(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The differences in what a model computes, a line each.

    Args:
        model: the architecture as mlx-lm builds it.
        config: its configuration.

    Raises:
        InputError: the difference is one that no use of the model bears.
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
    args = getattr(model, "args", None)
    one_expert = getattr(args, "num_experts_per_tok", None) == 1
    if name in _ONE_EXPERT_UNSCALED and one_expert and getattr(args, "norm_topk_prob", False):
        notes.append(
            f"mlx-lm's {name} does not scale the weight of a token's only expert to 1, "
            "transformers does (norm_topk_prob): their answers differ"
        )
    local = config.get("rope_local_base_freq", config.get("rope_theta"))
    if name == "olmo3" and local != config.get("rope_theta"):
        notes.append(
            "mlx-lm's olmo3 has one rope_theta for all layers, and this model another for those "
            "with a sliding window: its answers differ from those of transformers"
        )
    if name == "mamba2" and getattr(args, "n_groups", 1) > 1:
        notes.append(
            "mlx-lm's mamba2 normalizes all channels together, transformers each of the n_groups "
            "by itself: their answers differ"
        )
    if name == "mamba2" and getattr(args, "layer_norm_epsilon", 1e-5) != 1e-5:
        notes.append(
            "mlx-lm's mamba2 normalizes the input of its layers with 1e-5 instead of the model's "
            "layer_norm_epsilon: its answers differ from those of transformers"
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
        config.get("model_type") not in ("llama", "ministral3", "mistral")
        or "sliding_attention" in kinds
    )
    return None if applied else window
