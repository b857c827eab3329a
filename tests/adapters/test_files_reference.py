"""A run folder as mlx-lm reads it: the same model, the same logits."""

from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import save_adapter
from graft.adapters.targets import plan

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import LLAMA, QWEN2, make_model

load_adapters = pytest.importorskip("mlx_lm.tuner.utils").load_adapters
pytestmark = pytest.mark.reference

TOKENS = mx.array([[1, 5, 9, 300, 7, 2]])
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def build(config: dict[str, Any], bits: int | None) -> nn.Module:
    model = make_model(config)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    model.eval()
    return model


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    ("config", "method", "targets"),
    [
        (LLAMA, "lora", "all-linear"),
        (LLAMA, "lora", "all-linear,embed_tokens,lm_head"),
        (QWEN2, "lora", "q_proj,embed_tokens"),  # the embedding is the output too
        (MIXTRAL, "lora", "all-linear"),
        (LLAMA, "rslora", "all-linear"),
        (LLAMA, "loftq", "q_proj,v_proj"),
        (LLAMA, "pissa", "all-linear"),
        (LLAMA, "olora", "all-linear,embed_tokens"),
        (LLAMA, "dora", "all-linear"),
        (LLAMA, "dora", "q_proj,embed_tokens"),
        (QWEN2, "dora", "q_proj,embed_tokens"),
    ],
)
def test_a_run_folder_loads_in_mlx_lm_as_it_is(
    config: dict[str, Any], method: str, targets: str, bits: int | None, tmp_path: Path
) -> None:
    if bits and method == "dora" and "embed_tokens" in targets:
        pytest.skip("mlx-lm's DoRAEmbedding does not read quantized weights")
    if not bits and method == "loftq":
        pytest.skip("LoftQ is for quantized bases")
    ours = build(config, bits)
    attach(ours, plan(ours, targets, rank=4, alpha=6.0, method=method), for_loading=True)
    for number, (_, layer) in enumerate(lora_layers(ours)):
        for name in layer.tensors():
            noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
            layer[name] = layer[name] + 0.05 * noise
    save_adapter(tmp_path / "adapters.safetensors", ours)
    theirs = load_adapters(build(config, bits), str(tmp_path))
    theirs.eval()
    ours.eval()
    base = build(config, bits)(TOKENS)
    np.testing.assert_allclose(np.array(ours(TOKENS)), np.array(theirs(TOKENS)), atol=2e-5)
    assert mx.abs(theirs(TOKENS) - base).max().item() > 0.01
