"""graft/adapters/formats/peft.py: names, options and patterns of PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.attach import lora_layers
from graft.adapters.files import load_adapter
from graft.adapters.formats.mlx_lm import write_mlx_lm
from graft.adapters.formats.peft import write_peft
from graft.adapters.layer_config import LayerConfig
from graft.pretrained.base_config import BaseConfig

import mlx.core as mx
import numpy as np
import pytest

from support.adapter_cases import (
    DOWN,
    SHAPES,
    TOKENS,
    K,
    Q,
    change,
    embedding_adapter,
    logits,
    make_adapter,
    normal,
    refusal,
    write,
)
from support.tiny import LLAMA, QWEN2, make_model


def test_rslora_for_all_layers_stays_rslora_in_peft(tmp_path: Path) -> None:
    adapter = make_adapter({Q: LayerConfig(4, 6.0, "rslora"), K: LayerConfig(8, 5.0, "rslora")})
    again = load_adapter(write("peft", adapter, tmp_path))
    assert again.layers == adapter.layers
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True


def test_peft_s_names_shapes_and_configuration(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    assert tensors[f"base_model.model.{K}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"base_model.model.{K}.lora_B.weight"].shape == (32, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["target_modules"] == list(SHAPES)


def test_a_name_that_depends_on_the_base_model_needs_it(tmp_path: Path) -> None:
    path = "model.h.0.attn.c_attn"
    tensors = {f"{path}.lora_a": normal(64, 4), f"{path}.lora_b": normal(4, 192)}
    adapter = Adapter(tensors, {path: LayerConfig(4, 6.0)})
    assert "--model" in refusal(lambda: write_peft(adapter, tmp_path / "p"))
    sizes = {"n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 64}
    config = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "vocab_size": 400, **sizes}
    gpt2 = BaseConfig("tiny", config)
    assert write_peft(adapter, tmp_path / "p", base=gpt2) == []
    tensors = mx.load(str(tmp_path / "p" / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.transformer.h.0.") for name in tensors)


def test_a_tied_embedding_goes_through_peft_as_two_layers(tmp_path: Path) -> None:
    adapter, base = embedding_adapter(QWEN2), BaseConfig("tiny", QWEN2)
    assert "--model" in refusal(lambda: write_peft(adapter, tmp_path / "p"))
    notes = write_peft(adapter, tmp_path / "p", base=base)
    assert notes == ["model.embed_tokens is tied to the output: lm_head was given the same update"]
    again = load_adapter(tmp_path / "p")
    assert "lm_head" not in again.layers
    np.testing.assert_array_equal(logits(again, QWEN2), logits(adapter, QWEN2))


def test_an_input_embedding_alone_leaves_a_tied_output_as_it_was(tmp_path: Path) -> None:
    # PEFT adapts a tied embedding at the input only.
    adapter = embedding_adapter(QWEN2)
    layers = adapter.layers | {"model.embed_tokens": LayerConfig(4, 6.0, kind="embedding-input")}
    adapter = replace(adapter, layers=layers)
    model = make_model(QWEN2)
    apply_adapter(model, adapter, name="test")
    embedding = model.model.embed_tokens
    x = normal(1, 3, 64, seed=9)
    assert mx.array_equal(embedding.as_linear(x), embedding.base.as_linear(x))
    assert not mx.array_equal(embedding(TOKENS), embedding.base(TOKENS))
    write_peft(adapter, tmp_path / "p", base=BaseConfig("tiny", QWEN2))
    again = load_adapter(tmp_path / "p")
    np.testing.assert_array_equal(logits(again, QWEN2), logits(adapter, QWEN2))
    refused = refusal(lambda: write_mlx_lm(adapter, tmp_path / "m", base=BaseConfig("tiny", QWEN2)))
    assert "model.embed_tokens" in refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "VERA"}, "'VERA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": 3}, "something_new 3"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": "6"}, "lora_alpha '6'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "(a+)+$"),
        ({"alpha_pattern": {"(": 3}}, "'('"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"lora_dropout": 2}, "lora_dropout 2"),
    ],
)
def test_peft_options_that_would_change_the_result_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    change(folder / "adapter_config.json", **changes)
    assert named in refusal(lambda: load_adapter(folder))


def test_alpha_patterns_of_peft_are_matched_as_peft_does(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    patterns = {r"layers\.1\.self_attn\.[a-z]_proj": 3.0, "proj": 99.0, "down_proj": 5.0}
    change(folder / "adapter_config.json", alpha_pattern=patterns)
    alphas = {path: setting.alpha for path, setting in load_adapter(folder).layers.items()}
    assert alphas == {Q: 6.0, K: 3.0, DOWN: 5.0}  # "proj" is no whole part of a path


def test_names_of_compiled_models_and_of_named_adapters_are_read(tmp_path: Path) -> None:
    adapter = make_adapter()
    folder = write("peft", adapter, tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = {
        name.replace("base_model.model.", "base_model.model._orig_mod.").replace(
            ".weight", ".default.weight"
        ): array
        for name, array in mx.load(str(file)).items()
    }
    mx.save_safetensors(str(file), tensors)
    np.testing.assert_array_equal(logits(load_adapter(folder)), logits(adapter))


def test_single_experts_of_transformers_4_become_one_layer(tmp_path: Path) -> None:
    """Each expert's product is that of its own A and B; experts that are missing are refused."""
    before = "base_model.model.model.layers.0.block_sparse_moe.experts"
    tensors = {}
    for expert in range(4):
        tensors[f"{before}.{expert}.w2.lora_A.weight"] = normal(4, 128, seed=expert)
        tensors[f"{before}.{expert}.w2.lora_B.weight"] = normal(64, 4, seed=10 + expert)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w2"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    mx.save_safetensors(str(file), tensors)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    adapter = load_adapter(tmp_path)
    assert list(adapter.layers) == [path]
    model = make_model(
        LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    weight = dict(model.named_modules())[path].weight
    apply_adapter(model, adapter, name="experts")
    (fused,) = [layer.fuse().weight for _, layer in lora_layers(model)]
    for expert in range(4):
        a, b = (tensors[f"{before}.{expert}.w2.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(
            np.array(fused[expert] - weight[expert]), np.array(2 * b @ a), atol=1e-5
        )
    del tensors[f"{before}.1.w2.lora_A.weight"], tensors[f"{before}.1.w2.lora_B.weight"]
    mx.save_safetensors(str(file), tensors)
    assert "not all adapted" in refusal(lambda: load_adapter(tmp_path))
