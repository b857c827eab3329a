"""Adapters that change what a tiny model says, to be fused."""

from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, adapter_of
from graft.adapters.attach import attach, lora_layers
from graft.adapters.targets import plan
from graft.pretrained.load import read_model

import mlx.core as mx
import mlx.nn as nn


def adapted(
    base: Path, targets: str = "all-linear", *, size: float = 0.1, **settings: Any
) -> tuple[nn.Module, Adapter]:
    """A model with an adapter that changes what it says."""
    model, _ = read_model(base)
    attach(model, plan(model, targets, num_layers=-1, **{"rank": 4, "alpha": 6.0, **settings}))
    for number, (_, layer) in enumerate(lora_layers(model)):
        for name in layer.tensors():
            noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
            layer[name] = layer[name] + size * noise
    model.eval()
    return model, adapter_of(model, base_model=str(base))
