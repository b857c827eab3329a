"""Tiny adapters for a base model, and its logits with one attached as for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, adapter_of, apply_adapter
from graft.adapters.attach import attach, detach, lora_layers
from graft.adapters.formats.graft import write_adapter
from graft.adapters.targets import plan

import mlx.core as mx
import mlx.nn as nn

# Different ranks and targets, among them the output layer and a single layer.
PLANS: dict[str, dict[str, Any]] = {
    "one": {"targets": "all-linear", "rank": 1},
    "two": {"targets": "q_proj,v_proj", "rank": 2},
    "four": {"targets": "gate_proj,up_proj,down_proj", "rank": 4},
    "eight": {"targets": "all-linear", "rank": 8, "alpha": 4.0},
    "twelve": {"targets": "o_proj,lm_head", "rank": 12},
    "thirty": {"targets": "model.layers.1.mlp.up_proj", "rank": 30, "method": "rslora"},
    "sixty-four": {"targets": "q_proj,down_proj", "rank": 64},
}


def make_adapter(model: nn.Module, *, seed: int = 0, **settings: Any) -> Adapter:
    """An adapter with a nonzero update that leaves the logits about as large."""
    attach(model, plan(model, **settings), seed=seed)
    for number, (_, layer) in enumerate(lora_layers(model)):
        tensors = layer.tensors()
        key = mx.random.key(1000 * seed + number)
        noise = 0.05 * mx.random.normal(tensors["lora_b"].shape, key=key)
        layer.load({**tensors, "lora_b": tensors["lora_b"] + noise})
    adapter = adapter_of(model)
    mx.eval(adapter.tensors)
    detach(model)
    return adapter


def write_adapters(folder: Path, model: nn.Module) -> dict[str, Path]:
    """Write each adapter of `PLANS` to a folder; returns the folders by name."""
    paths = {}
    for seed, (name, settings) in enumerate(PLANS.items()):
        paths[name] = write(folder / name, make_adapter(model, seed=seed, **settings))
    return paths


def write(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir(parents=True)
    write_adapter(folder / "adapters.safetensors", adapter)
    return folder


@contextmanager
def attached(model: nn.Module, adapter: Adapter, scale: float = 1.0) -> Iterator[nn.Module]:
    """The model with an adapter attached as for training, its update times `scale`."""
    halves = {n: scale * a if n.endswith("lora_b") else a for n, a in adapter.tensors.items()}
    apply_adapter(model, replace(adapter, tensors=halves), name="a")
    try:
        yield model
    finally:
        detach(model)


def logits_with(
    model: nn.Module, tokens: mx.array, adapter: Adapter | None, scale: float = 1.0
) -> mx.array:
    """The logits of `tokens` with an adapter attached, or without one."""
    if adapter is None:
        logits = model(tokens)
        mx.eval(logits)
        return logits
    with attached(model, adapter, scale):
        logits = model(tokens)
        mx.eval(logits)
    return logits
