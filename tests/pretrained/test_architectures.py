"""The table of architectures: names are mlx-lm's, and each quirk has one entry."""

import importlib
import pkgutil

from graft.pretrained.architectures import (
    ARCHITECTURES,
    EXPERT_LAYERS,
    ONCE,
    architecture_of,
    find_architecture,
    holds_experts,
    is_embedding,
)

import mlx.nn as nn
import mlx_lm.models
import pytest

IN_MLX_LM = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_name_is_a_module_of_mlx_lm(name: str) -> None:
    # Mistral's models are mlx-lm's `llama`, which its own table says.
    assert name in IN_MLX_LM or name == "mistral"


def test_an_architecture_without_quirks_needs_no_entry() -> None:
    quirks = find_architecture("no such architecture")
    assert (quirks.fused_parts, quirks.llama_cpp) == (ONCE, None)


def test_a_layer_tells_its_architecture_only_from_mlx_lm() -> None:
    from mlx_lm.models.gpt_neox import Attention

    layer = Attention.__new__(Attention)
    assert architecture_of(layer) is ARCHITECTURES["gpt_neox"]
    assert architecture_of(nn.Linear(2, 2)) is find_architecture("")


@pytest.mark.parametrize("name", EXPERT_LAYERS)
def test_layers_of_experts_are_mlx_lms(name: str) -> None:
    module, _, layer = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), layer), nn.Module)


def test_special_names_of_llama_cpp_take_the_place_of_the_usual_ones() -> None:
    names = ARCHITECTURES["phi3"].llama_cpp
    assert names is not None
    assert names.block["mlp.gate_up_proj"] == "ffn_up"
    assert "mlp.up_proj" not in names.block
    assert names.block["mlp.down_proj"] == "ffn_down"


def test_what_a_name_tells_of_a_layer() -> None:
    assert is_embedding("model.embed_tokens")
    assert not is_embedding("model.embed_tokens.proj")
    assert holds_experts("model.layers.0.mlp.switch_mlp.up_proj")
    assert not holds_experts("model.layers.0.mlp.up_proj")
