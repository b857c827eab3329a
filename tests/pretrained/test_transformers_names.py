"""transformers' names and layouts: the inverse of mlx-lm's `sanitize`."""

import json

from graft.pretrained.load import build_model
from graft.pretrained.mlx_names import parameters_of, sanitized
from graft.pretrained.transformers_names import (
    KNOWN,
    in_transformers,
    is_lost_in_peft,
    layer_in_mlx_lm,
    layer_in_transformers,
)
from graft.storage.lazy_tensors import Output

import mlx.core as mx
import pytest

from support.paths import ROOT

CONFIGS = json.loads((ROOT / "tests/support/data/architectures.json").read_text())


@pytest.mark.parametrize("architecture", sorted(KNOWN))
def test_sanitize_undoes_the_translation_to_the_bit(architecture: str) -> None:
    model = build_model(CONFIGS[architecture])
    # `sanitize` subtracts and adds 1 to some norms: of whole numbers, exactly.
    arrays = {
        name: mx.arange(array.size).reshape(array.shape).astype(mx.float32)
        for name, array in parameters_of(model).items()
    }
    outputs = [Output(name, a.dtype, a.shape, iter([a])) for name, a in arrays.items()]
    translated = {}
    for output in in_transformers(outputs, architecture):
        (translated[output.name],) = output.blocks
        assert (translated[output.name].shape, translated[output.name].dtype) == output[2:0:-1]
    assert not any("switch_mlp" in name for name in translated)
    back = sanitized(model, translated, "the translation")
    assert back.keys() == arrays.keys()
    assert all(mx.array_equal(back[name], array).item() for name, array in arrays.items())


@pytest.mark.parametrize(
    ("architecture", "mine", "theirs"),
    [
        ("gpt2", "model.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "model.h.1.mlp.dense_h_to_4h", "gpt_neox.layers.1.mlp.dense_h_to_4h"),
        ("gpt_neox", "model.embed_out", "lm_head"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        (
            "gemma3",
            "language_model.model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_paths_of_layers_go_both_ways(architecture: str, mine: str, theirs: str) -> None:
    assert layer_in_transformers(mine, architecture) == theirs
    assert layer_in_mlx_lm(theirs, architecture, {mine}) == mine
    assert layer_in_mlx_lm(mine, architecture, {mine}) == mine
    assert layer_in_mlx_lm("elsewhere", architecture, {mine}) == "elsewhere"


def test_the_output_head_of_gpt_neox_is_read_under_its_older_name() -> None:
    assert layer_in_mlx_lm("embed_out", "gpt_neox", {"model.embed_out"}) == "model.embed_out"


def test_layers_that_peft_would_not_apply() -> None:
    assert is_lost_in_peft("model.layers.0.block_sparse_moe.gate", "mixtral")
    assert is_lost_in_peft("model.layers.0.mlp.gate_proj", "qwen3_moe")
    assert not is_lost_in_peft("model.layers.0.mlp.gate_proj", "qwen3")
    assert is_lost_in_peft("backbone.layers.0.mixer.dt_proj", "mamba")
