"""Which layers are quantized, and how; tests/test_convert.py compares it with mlx-lm."""

from graft.errors import InputError
from graft.quantization.choose import (
    can_quantize,
    choose_quantized_layers,
    quantization_settings,
    settings_like,
)

import mlx.nn as nn
import pytest

from support.architectures import read_configs
from support.tiny import LLAMA, make_model


def test_all_settings_that_mlx_lacks_are_named() -> None:
    with pytest.raises(InputError, match=r"--q-bits 7 .*; --q-group-size 48 ") as error:
        quantization_settings(7, 48)
    assert "\n" not in str(error.value)
    assert quantization_settings(None, None) == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_the_record_lists_what_differs_from_the_common_settings() -> None:
    model = make_model(LLAMA)
    settings = quantization_settings(4, 32)
    head = {"group_size": 64, "bits": 8}
    model.quant_predicate = lambda path, module: head if path == "lm_head" else True
    plan = choose_quantized_layers(model, settings, ["v_proj"])
    assert plan.layers["lm_head"] == head | {"mode": "affine"}
    assert plan.layers["model.embed_tokens"] == settings
    assert not [path for path in plan.layers if path.endswith("v_proj")]
    assert plan.record == settings | {"lm_head": head | {"mode": "affine"}}
    assert plan.notes == [
        "not quantized, as --q-skip says: model.layers.*.self_attn.v_proj (3)",
    ]


def test_a_layer_is_quantized_again_as_it_was_or_to_other_bits() -> None:
    layer = nn.Linear(64, 64)
    assert settings_like(layer, None) == {"group_size": 64, "bits": 4, "mode": "affine"}
    affine = layer.to_quantized(group_size=32, bits=3)
    assert settings_like(affine, None) == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert settings_like(affine, 6) == {"group_size": 32, "bits": 6, "mode": "affine"}
    other = layer.to_quantized(group_size=16, bits=4, mode="nvfp4")
    assert settings_like(other, 4) == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert settings_like(other, 8) == {"group_size": 32, "bits": 8, "mode": "affine"}


def test_norms_and_odd_widths_cannot_be_quantized() -> None:
    assert can_quantize(nn.Linear(128, 3))
    assert not can_quantize(nn.Linear(96, 3))
    assert not can_quantize(nn.RMSNorm(128))


def test_an_embedding_whose_weight_the_architecture_reads_is_left_out() -> None:
    """The tied output of seed_oss multiplies by the embedding's weight, whatever it holds."""
    config = read_configs()["seed_oss"]
    plan = choose_quantized_layers(make_model(config), quantization_settings(4, 32))
    assert "model.embed_tokens" not in plan.layers and "model.layers.0.mlp.up_proj" in plan.layers
    assert "not quantized, since the architecture reads their weight" in plan.notes[0]


def test_a_layer_that_cannot_take_the_settings_is_left_out() -> None:
    """The fused projection of afm7 has a method to quantize itself, but without a mode."""
    plan = choose_quantized_layers(make_model(read_configs()["afm7"]), quantization_settings(4, 32))
    assert not [path for path in plan.layers if path.endswith("qkv_proj")]
    assert any("FusedLinear" in note for note in plan.notes)
