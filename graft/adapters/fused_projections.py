"""Finds the parts of fused projections: linear layers that compute several projections at once."""

from collections.abc import Sequence

from graft.adapters.layer_kinds import LINEAR, FusedParts, kind_of
from graft.models import linear_dims
from graft.pretrained.architectures import (
    FUSED_PROJECTIONS,
    HEAD_COUNTS,
    KEY_VALUE_HEAD_COUNTS,
    ONCE,
    PER_HEAD,
    PER_KEY_VALUE_HEAD,
    QUERY_KEY_VALUE,
    architecture_of,
)

import mlx.nn as nn


def find_fused_parts(module: nn.Module, name: str, parent: nn.Module | None) -> FusedParts | None:
    """The parts of a linear layer, none of them enabled; `None` if its name is not that of one.

    Args:
        module: the layer.
        name: the last part of its path.
        parent: the module that contains it; its numbers of heads determine the parts' sizes.
    """
    names = FUSED_PROJECTIONS.get(name)
    if names is None or kind_of(module) is not LINEAR:
        return None
    outputs = linear_dims(module)[1]
    heads = _attribute(parent, HEAD_COUNTS) or 1
    groups = _attribute(parent, KEY_VALUE_HEAD_COUNTS) or heads
    shares = (heads // groups, 1, 1) if names is QUERY_KEY_VALUE else (1,) * len(names)
    unit, rest = divmod(outputs, sum(shares))
    counts = {ONCE: 1, PER_HEAD: heads, PER_KEY_VALUE_HEAD: groups}
    repeats = counts[architecture_of(parent).fused_parts]
    if rest or unit % repeats or (names is QUERY_KEY_VALUE and heads % groups):
        return None
    return FusedParts(names, tuple(unit // repeats * share for share in shares), (), repeats)


def _attribute(module: nn.Module | None, names: Sequence[str]) -> int | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
