from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach, lora_layers
from graft.adapters.fused_projections import find_fused_parts
from graft.adapters.layer_kinds import FusedParts
from graft.adapters.targets import plan

import mlx.core as mx
import mlx.nn as nn
import pytest

from support.tiny import LLAMA, make_model

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 100,
}
PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3"}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-5,
    "vocab_size": 100,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
}
INTERNLM2: dict[str, Any] = {**LLAMA, "model_type": "internlm2"}


def columns_of(model: nn.Module, path: str, part: str) -> set[int]:
    """Outputs of a fused projection that a part's update reaches."""
    attach(model, plan(model, f"{path}.{part}", rank=1, num_layers=-1))
    (layer,) = (layer for found, layer in lora_layers(model) if found == path)
    layer.lora_b = mx.ones_like(layer.lora_b)
    rows = mx.any(layer.delta() != 0, axis=1).tolist()
    return {number for number, reached in enumerate(rows) if reached}


@pytest.mark.parametrize(
    ("config", "path", "split"),
    [
        # mlx_lm/models/gpt2.py: mx.split(qkv, 3, axis=-1)
        (GPT2, "model.h.0.attn.c_attn", {"q": range(32), "v": range(64, 96)}),
        # phi3.py: queries of all heads, then keys, then values; 4 heads of 16, 2 for keys
        (
            PHI3,
            "model.layers.0.self_attn.qkv_proj",
            {"q": range(64), "k": range(64, 96), "v": range(96, 128)},
        ),
        (PHI3, "model.layers.0.mlp.gate_up_proj", {"gate": range(128), "up": range(128, 256)}),
        # gpt_neox.py: reshape to (heads, 3 * 8), then split in three
        (
            NEOX,
            "model.h.0.attention.query_key_value",
            {"k": [head * 24 + 8 + i for head in range(4) for i in range(8)]},
        ),
        # internlm2.py: reshape to (key-value heads, 2 queries + key + value, 16)
        (
            INTERNLM2,
            "model.layers.0.attention.wqkv",
            {
                "q": [group * 64 + i for group in range(2) for i in range(32)],
                "v": [group * 64 + 48 + i for group in range(2) for i in range(16)],
            },
        ),
    ],
)
def test_parts_are_where_the_architecture_splits(
    config: dict[str, Any], path: str, split: dict[str, Any]
) -> None:
    for part, columns in split.items():
        assert columns_of(make_model(config), path, part) == set(columns)


def test_the_key_part_changes_what_the_architecture_takes_for_keys() -> None:
    """With B of the keys trained, the keys in the cache change, and the values do not."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([[1, 5, 9, 30]])
    for config, name in ((NEOX, "query_key_value"), (INTERNLM2, "wqkv"), (PHI3, "qkv_proj")):
        model = make_model(config)
        before = make_prompt_cache(model)
        model(tokens, cache=before)
        attach(model, plan(model, f"{name}.k", rank=1, num_layers=-1))
        first = lora_layers(model)[0][1]
        first.lora_b = mx.ones_like(first.lora_b)
        after = make_prompt_cache(model)
        model(tokens, cache=after)
        assert not mx.allclose(before[0].keys, after[0].keys), name
        assert mx.array_equal(before[0].values, after[0].values), name


def test_a_layer_without_a_fused_name_has_no_parts() -> None:
    assert find_fused_parts(nn.Linear(4, 12), "q_proj", None) is None
    assert find_fused_parts(nn.Linear(4, 12), "qkv", None) == FusedParts(
        ("q", "k", "v"), (4, 4, 4), ()
    )
    assert find_fused_parts(nn.Linear(4, 13), "qkv", None) is None
