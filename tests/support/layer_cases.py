"""Layers of every kind under every method, for test_adapted_layer and test_layer_kinds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import FusedParts
from graft.adapters.methods import METHODS

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

RANK, ALPHA = 2, 3.0
FLOATING_MODES = ("mxfp4", "nvfp4", "mxfp8")
QKV = FusedParts(("q", "k", "v"), (32, 16, 16), ("q", "v"))
PER_HEAD = FusedParts(("q", "k", "v"), (8, 8, 8), ("k",), repeats=4)


@dataclass(frozen=True)
class Case:
    """A layer to adapt, what to call it with, and how it is adapted."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    setting: LayerConfig = field(default=LayerConfig(RANK, ALPHA))


def normal(*shape: int, seed: int = 7) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def quantized(layer: nn.Module, **settings: Any) -> nn.Module:
    return layer.to_quantized(**{"group_size": 32, "bits": 4, **settings})


def experts() -> nn.Module:
    layer = SwitchLinear(32, 16, 4)
    layer.bias = normal(4, 16)
    return layer


def expert_inputs() -> tuple[Any, ...]:
    return normal(3, 1, 1, 32), mx.array([[0, 2], [3, 1], [2, 2]])


def ids() -> tuple[Any, ...]:
    return (mx.array([[1, 5, 0], [39, 5, 7]]),)


def row() -> tuple[Any, ...]:
    return (normal(2, 5, 64),)


MERGE_FIRST = LayerConfig(RANK, ALPHA, "merge-first")
NO_RANK = LayerConfig(1, 1.0)

CASES = {
    "linear": Case(lambda: nn.Linear(64, 48), row),
    "linear without bias": Case(lambda: nn.Linear(64, 48, bias=False), row),
    **{
        f"linear affine {bits}": Case(lambda b=bits: quantized(nn.Linear(64, 48), bits=b), row)
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "linear mxfp4": Case(lambda: quantized(nn.Linear(64, 48), mode="mxfp4"), row),
    "linear nvfp4": Case(
        lambda: quantized(nn.Linear(64, 48, bias=False), mode="nvfp4", group_size=16), row
    ),
    "linear mxfp8": Case(lambda: quantized(nn.Linear(64, 48), mode="mxfp8", bits=8), row),
    "embedding": Case(lambda: nn.Embedding(40, 32), ids),
    "embedding affine 4": Case(lambda: quantized(nn.Embedding(40, 32)), ids),
    "embedding mxfp4": Case(lambda: quantized(nn.Embedding(40, 32), mode="mxfp4"), ids),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: (normal(2, 9, 6),)),
    "conv1d dilated grouped": Case(
        lambda: nn.Conv1d(6, 8, 3, dilation=2, groups=2, bias=False), lambda: (normal(2, 9, 6),)
    ),
    "conv1d depthwise": Case(
        lambda: nn.Conv1d(6, 6, 3, groups=6), lambda: (normal(2, 9, 6),), LayerConfig(1, 2.0)
    ),
    "conv2d": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)),
        lambda: (normal(2, 6, 7, 4),),
    ),
    "conv2d dilated grouped": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), lambda: (normal(2, 6, 7, 4),)
    ),
    "conv2d pointwise": Case(lambda: nn.Conv2d(4, 6, 1), lambda: (normal(2, 6, 7, 4),)),
    "conv3d": Case(
        lambda: nn.Conv3d(3, 4, (2, 3, 1), stride=(1, 2, 1), padding=1),
        lambda: (normal(1, 4, 5, 3, 3),),
    ),
    "fused": Case(
        lambda: nn.Linear(32, 64), lambda: (normal(2, 5, 32),), LayerConfig(2, 3.0, parts=QKV)
    ),
    "fused quantized": Case(
        lambda: quantized(nn.Linear(32, 64)),
        lambda: (normal(2, 5, 32),),
        LayerConfig(2, 3.0, parts=QKV),
    ),
    "fused per head": Case(
        lambda: nn.Linear(32, 96), lambda: (normal(2, 5, 32),), LayerConfig(2, 3.0, parts=PER_HEAD)
    ),
    "experts": Case(experts, expert_inputs),
    "experts quantized": Case(lambda: quantized(experts()), expert_inputs),
    "rms norm": Case(lambda: nn.RMSNorm(64), row, NO_RANK),
    "layer norm": Case(lambda: nn.LayerNorm(64), row, NO_RANK),
    "group norm": Case(lambda: nn.GroupNorm(4, 64), row, NO_RANK),
    "bias": Case(lambda: nn.Linear(64, 48), row, LayerConfig(1, 1.0, "bias")),
    "bias of a quantized layer": Case(
        lambda: quantized(nn.Linear(64, 48)), row, LayerConfig(1, 1.0, "bias")
    ),
    "merge-first linear": Case(lambda: nn.Linear(64, 48), row, MERGE_FIRST),
    "merge-first quantized": Case(lambda: quantized(nn.Linear(64, 48)), row, MERGE_FIRST),
    "merge-first embedding": Case(lambda: nn.Embedding(40, 32), ids, MERGE_FIRST),
    "merge-first conv2d": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: (normal(2, 6, 7, 4),), MERGE_FIRST
    ),
    "transposed convolution": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: (normal(2, 3, 4, 4),)
    ),
}


def by_method(method: str, *names: str, kind: str | None = None) -> dict[str, Case]:
    """Cases of other methods over layers that stand above."""
    rank, alpha = (RANK, ALPHA) if METHODS[method].ranked else (1, 1.0)
    setting = LayerConfig(rank, alpha, method, kind)
    return {f"{method} {kind or name}": replace(CASES[name], setting=setting) for name in names}


CASES |= {
    **by_method("rslora", "linear", "conv2d"),
    **by_method("dora", "linear", "linear without bias", "linear affine 4", "linear mxfp4"),
    **by_method("dora", "embedding", "embedding affine 4", "conv2d dilated grouped", "conv3d"),
    **by_method("dora", "experts", "experts quantized"),
    **by_method("dora", "embedding", kind="embedding-columns"),
    **by_method("pissa", "linear", "linear affine 4", "embedding", "conv2d"),
    **by_method("olora", "linear", "linear affine 4", "embedding", "conv2d"),
    **by_method("vera", "linear", "linear affine 4", "embedding", "conv2d"),
    **by_method("ia3", "linear", "linear affine 4", "conv2d dilated grouped"),
    **by_method("ia3-input", "linear", "linear affine 4", "conv2d dilated grouped"),
    **by_method("full", "linear", "linear affine 4", "embedding", "embedding affine 4"),
    **by_method("full", "conv1d depthwise", "experts", "experts quantized", "layer norm"),
    **by_method("bias", "conv2d", "layer norm", "experts quantized"),
    **by_method("norm", "layer norm", "group norm"),
}


class Model(nn.Module):
    """One layer to adapt, and one beside it that is left alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(3, 3)

    def __call__(self, *inputs: Any) -> mx.array:
        return self.layer(*inputs)


def make(name: str) -> tuple[Case, Model]:
    mx.random.seed(1)
    case = CASES[name]
    model = Model(case.make())
    for key, array in model.layer.items():
        if key in ("bias",):  # zero at first in some layers, which would hide mistakes
            model.layer[key] = normal(*array.shape, seed=11)
    mx.eval(model.parameters())
    return case, model


def adapt(name: str, *, trained: bool = True) -> tuple[Case, Model, Any]:
    case, model = make(name)
    attach(model, {"layer": case.setting}, seed=3)
    if trained:
        shift(model.layer)
    return case, model, model.layer


def shift(layer: Any) -> None:
    """Move every tensor of a layer, as training would."""
    for number, key in enumerate(layer.tensors()):
        layer[key] = layer[key] + 0.2 * normal(*layer[key].shape, seed=20 + number)


def bits_of(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)))


def frozen_bytes(layer: nn.Module) -> dict[str, bytes]:
    return {key: bits_of(array) for key, array in layer.items() if isinstance(array, mx.array)}


def close(first: mx.array, second: mx.array, *, name: str = "") -> None:
    """Equal to rounding; a whole weight made of mxfp4 and its like is bfloat16, with 8 bits."""
    atol = 0.02 if name.endswith(FLOATING_MODES) else 2e-5
    arrays = (np.array(array.astype(mx.float32)) for array in (first, second))
    np.testing.assert_allclose(*arrays, atol=atol, rtol=1e-5)
