"""Packing as MLX packs, and outputs nearer than plain rounding leaves them."""

from typing import Any

import graft  # noqa: F401
from graft.data.collate import Batch
from graft.quantization import gptq as rounding
from graft.quantization.gptq import grams, pack_codes, quantize_for

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import LLAMA, make_model


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    weight = mx.random.normal((7, 128), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    whole = mx.dequantize(packed, scales, biases, group_size=64, bits=bits)
    spread = [np.repeat(np.array(array), 64, axis=1) for array in (scales, biases)]
    codes = np.round((np.array(whole) - spread[1]) / spread[0]).astype(np.uint8)
    assert mx.array_equal(pack_codes(codes, bits), packed)


def correlated(rows: int, inputs: int) -> np.ndarray:
    """Inputs in few directions and a little noise, as those of a language model."""
    rng = np.random.default_rng(0)
    main = rng.normal(size=(rows, inputs // 8)) @ rng.normal(size=(inputs // 8, inputs))
    return (main + 0.3 * rng.normal(size=(rows, inputs))).astype(np.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_outputs_are_nearer_than_with_plain_rounding(bits: int, dtype: mx.Dtype) -> None:
    weight = mx.random.normal((48, 128), key=mx.random.key(1)).astype(dtype)
    x, unseen = np.split(correlated(768, 128), [512])
    settings: dict[str, Any] = {"group_size": 64, "bits": bits}
    plain = mx.dequantize(*mx.quantize(weight, **settings), **settings)
    ours = quantize_for(weight, x.T @ x, **settings)
    careful = mx.dequantize(ours["weight"], ours["scales"], ours["biases"], **settings)
    assert ours["scales"].dtype == dtype
    errors = [
        np.linalg.norm(unseen @ (np.array((w - weight).astype(mx.float32))).T)
        for w in (plain, careful)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_without_any_correlation_it_is_plain_rounding() -> None:
    weight = mx.random.normal((16, 64), key=mx.random.key(1))
    ours = quantize_for(weight, np.eye(64, dtype=np.float32), group_size=32, bits=4)
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=4)
    assert mx.array_equal(ours["weight"], packed)
    assert mx.array_equal(ours["scales"], scales) and mx.array_equal(ours["biases"], biases)


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    weight = mx.random.normal((16, 64), key=mx.random.key(1))
    ours = quantize_for(weight, np.zeros((64, 64), np.float32), group_size=32, bits=4)
    assert mx.array_equal(ours["weight"], mx.quantize(weight, group_size=32, bits=4)[0])


@pytest.mark.parametrize("memory", [rounding.GRAM_BYTES, 1])
def test_grams_are_those_of_the_layers_inputs(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "GRAM_BYTES", memory)
    model = make_model(LLAMA)
    model.eval()
    before = dict(model.named_modules())
    ids = np.array([[1, 5, 9, 300, 7]], np.int32)
    batch = Batch((0,), {"inputs": ids})
    paths = {"model.layers.0.self_attn.q_proj": 64, "model.layers.0.mlp.down_proj": 128}
    found = dict(grams(model, [batch, batch], paths))
    assert all(module is before[path] for path, module in model.named_modules())
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(mx.array(ids)))[0]
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj"], 2 * (x.T @ x), rtol=1e-4)
    mask = nn.MultiHeadAttention.create_additive_causal_mask(5)
    h = model.model.embed_tokens(mx.array(ids))
    h = h + block.self_attn(block.input_layernorm(h), mask, None)
    y = block.post_attention_layernorm(h)
    z = (nn.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))[0]
    np.testing.assert_allclose(
        found["model.layers.0.mlp.down_proj"], 2 * (z.T @ z), rtol=1e-3, atol=1e-6
    )
