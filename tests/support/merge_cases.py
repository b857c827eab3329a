"""Adapters of tiny models, to be merged or extracted."""

from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.targets import plan

import mlx.core as mx
import numpy as np

from support.tiny import LLAMA, make_model

IDS = mx.array([[1, 5, 9, 300, 7, 2, 42, 17]])
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def make_adapter(
    seed: int, *, config: dict[str, Any] = LLAMA, targets: str = "q_proj,down_proj", rank: int = 4
) -> Adapter:
    layers = plan(make_model(config), targets, rank=rank, alpha=1.5 * rank, num_layers=-1)
    model = make_model(config)
    attach(model, layers)
    tensors = {}
    for number, (path, layer) in enumerate(lora_layers(model)):
        for half, name in enumerate(("lora_a", "lora_b")):
            key = mx.random.key(1000 * seed + 2 * number + half)
            tensors[f"{path}.{name}"] = 0.2 * mx.random.normal(layer[name].shape, key=key)
    return Adapter(tensors, layers)


def deltas(adapter: Adapter, config: dict[str, Any] = LLAMA) -> dict[str, np.ndarray]:
    model = make_model(config)
    apply_adapter(model, adapter, name="test")
    return {path: np.array(layer.delta()) for path, layer in lora_layers(model)}
