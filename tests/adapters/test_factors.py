"""graft/adapters/factors.py: layers as A, B and scale."""

from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import Adapter
from graft.adapters.attach import attach
from graft.adapters.factors import Factors, factors_of, from_factors
from graft.adapters.files import load_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import LAYER_KINDS, LINEAR, FusedParts

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.adapter_cases import normal, write


def test_a_fused_projection_becomes_one_layer_with_a_rank_a_part() -> None:
    parts = FusedParts(("q", "k", "v"), (4, 2, 2), ("q", "v"), repeats=3)
    setting = LayerConfig(2, 3.0, "lora", "fused", parts)
    tensors = {"c_attn.lora_a": normal(16, 4), "c_attn.lora_b": normal(2, 18, seed=1)}
    found = factors_of(Adapter(tensors, {"c_attn": setting}), holder="any", kinds=(LINEAR,))
    layer = nn.Sequential(nn.Linear(16, 24))
    attach(layer, {"layers.0": setting})
    layer.layers[0].load({"lora_a": tensors["c_attn.lora_a"], "lora_b": tensors["c_attn.lora_b"]})
    product = found["c_attn"]
    mine = product.scale * (product.a @ product.b).T
    np.testing.assert_allclose(np.array(mine), np.array(layer.layers[0].delta()), atol=1e-6)


@pytest.mark.parametrize(
    ("path", "kind", "a_shape"),
    [
        ("model.embed_tokens", "embedding", (512, 4)),
        ("model.embed_tokens", "embedding-input", (512, 4)),
        ("model.layers.0.conv", "conv", (3, 64, 4)),
        ("model.layers.0.conv", "conv", (3, 3, 64, 4)),
        ("model.layers.0.mlp.switch_mlp.up_proj", "experts", (2, 4, 64)),
    ],
)
def test_kinds_that_others_tell_stand_in_graft_s_own_form(
    path: str, kind: str, a_shape: tuple[int, ...], tmp_path: Path
) -> None:
    b_shape = (2, 64, 4) if kind == "experts" else (4, 64)
    layer_kind = LAYER_KINDS[kind]
    factors = Factors(layer_kind, mx.ones(a_shape), mx.ones(b_shape), 6.0)
    place = write("npz", from_factors({path: factors}), tmp_path)
    (found,) = factors_of(load_adapter(place), holder="test", kinds=(layer_kind,)).values()
    assert (found.kind, found.a.shape, found.b.shape) == (layer_kind, a_shape, b_shape)
