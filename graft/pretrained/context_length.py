"""The longest row that a model was made for, by whatever name its configuration has it."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

# Entries of config.json; the first that is a number counts.
CONTEXT_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    *("max_context_length", "model_max_length", "seq_length", "sequence_len", "n_ctx"),
)
# Where models of text and images keep the configuration of their language model.
LANGUAGE_MODELS = ("text_config", "language_config", "llm_config")


def context_length(source: nn.Module | Mapping[str, Any] | None) -> int | None:
    """The longest row in tokens; `None` if there is no limit or none is given.

    Args:
        source: a model that was loaded or built, or a configuration.
    """
    if isinstance(source, nn.Module):
        loaded: int | None = getattr(source, "context_tokens", None)
        return loaded or _find(getattr(source, "args", None))
    return _find(source)


def _find(config: Any) -> int | None:
    """In a mapping, or in the arguments that mlx-lm makes from one."""
    entries = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name in CONTEXT_NAMES:
        if type(value := entries.get(name)) is int and value > 0:
            return value
    nested = (_find(entries[name]) for name in LANGUAGE_MODELS if entries.get(name) is not None)
    return next(filter(None, nested), None)
