"""What is written is what each layer makes of itself; others load it."""

import json
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, adapter_of
from graft.adapters.attach import attach, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import FusedParts
from graft.errors import InputError
from graft.exporting.fused_model import Fusion, quantized_bits, write_fused_model
from graft.pretrained.load import read_model
from graft.quantization.choose import UNQUANTIZED

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from support.fusion_cases import adapted
from support.tiny import LLAMA, QWEN2, make_model, write_model

IDS = mx.array([[1, 5, 9, 300, 7, 2, 42, 17]])
META = {**LLAMA, "rope_traditional": True}


def fused(base: Path, out: Path, adapter: Adapter, **form: Any) -> nn.Module:
    out.mkdir()
    write_fused_model(Fusion(str(base), adapter, **form), out)
    return read_model(out)[0]


def same_parameters(first: nn.Module, second: nn.Module) -> None:
    one, two = (dict(tree_flatten(m.parameters())) for m in (first, second))
    assert one.keys() == two.keys()
    assert [
        n for n in one if one[n].dtype != two[n].dtype or not mx.array_equal(one[n], two[n])
    ] == []


@pytest.mark.parametrize(
    ("bits", "form"),
    [
        *((None, "safetensors"), (4, "safetensors"), (3, "safetensors"), (4, "npz")),
        pytest.param(None, "npz", marks=pytest.mark.slow),
        pytest.param(3, "npz", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("config", "targets", "method"),
    [
        (LLAMA, "all-linear,embed_tokens,lm_head", "lora"),
        (QWEN2, "q_proj,down_proj,embed_tokens", "dora"),
        (LLAMA, "all-linear", "pissa"),
        (LLAMA, "*norm*", "norm"),
        (LLAMA, "v_proj,down_proj", "ia3"),
    ],
)
def test_the_stream_writes_what_each_layer_makes_of_itself(
    config: dict[str, Any], targets: str, method: str, bits: int | None, form: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", config, bits=bits, form=form)
    model, adapter = adapted(base, targets, method=method)
    found = fused(base, tmp_path / "out", adapter)
    for path, layer in lora_layers(model):
        model.update_modules(tree_unflatten([(path, layer.fuse())]))
    same_parameters(found, model)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("config", [LLAMA, QWEN2])
def test_dequantized_keeps_the_adapter_to_rounding(
    config: dict[str, Any], bits: int | None, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", config, bits=bits)
    model, adapter = adapted(base)
    found = fused(base, tmp_path / "out", adapter, dequantize=True)
    np.testing.assert_allclose(np.array(found(IDS)), np.array(model(IDS)), atol=1e-4)
    assert mx.abs(model(IDS) - read_model(base)[0](IDS)).max().item() > 0.1
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, META])
def test_transformers_loads_a_dequantized_model(
    config: dict[str, Any], bits: int | None, tmp_path: Path
) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    base = write_model(tmp_path / "base", config, bits=bits)
    model, adapter = adapted(base)
    fused(base, tmp_path / "out", adapter, dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS.tolist())).logits.numpy()
    np.testing.assert_allclose(logits, np.array(model(IDS)), atol=2e-4)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more_bits", [{}, {"model.layers.1.self_attn.q_proj": 8}])
@pytest.mark.parametrize("config", [LLAMA, META])
def test_mlx_lm_loads_a_quantized_model(
    config: dict[str, Any], more_bits: dict[str, int], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as load_with_mlx_lm

    base = write_model(tmp_path / "base", config, bits=4)
    _, adapter = adapted(base)
    more_bits = {**more_bits, "lm_head": UNQUANTIZED} if more_bits else {}
    found = fused(base, tmp_path / "out", adapter, more_bits=more_bits)
    theirs, _ = load_with_mlx_lm(tmp_path / "out")
    same_parameters(theirs, found)
    # Graft computes quantized layers on the CPU in its own way, which rounds otherwise.
    np.testing.assert_allclose(np.array(theirs(IDS)), np.array(found(IDS)), atol=1e-4)
    if more_bits:
        assert theirs.model.layers[1].self_attn.q_proj.bits == 8
        assert theirs.model.layers[0].self_attn.q_proj.bits == 4


@pytest.mark.parametrize("bits", [None, 4])
def test_q_bits_quantizes_every_layer(bits: int | None, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", bits=bits, group_size=64)
    model, adapter = adapted(base, "q_proj")
    found = fused(base, tmp_path / "out", adapter, q_bits=8)
    kinds = [m.bits for _, m in found.named_modules() if hasattr(m, "bits")]
    assert len(kinds) == 3 * 7 + 2 and set(kinds) == {8}
    np.testing.assert_allclose(np.array(found(IDS)), np.array(model(IDS)), atol=0.1)


def test_the_layers_that_are_quantized_anew(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", bits=4)
    model, adapter = adapted(base, "q_proj,*norm")
    every = {p for p, module in model.named_modules() if hasattr(module, "bits")}
    changed = {p for p in every if "q_proj" in p}
    own = {p.removesuffix(".linear") for p in changed}

    def bits(**form: Any) -> dict[str, int]:
        return quantized_bits(Fusion(str(base), adapter, **form), model)

    assert bits() == dict.fromkeys(own, 4)
    assert bits(q_bits=4) == bits() and bits(dequantize=True) == {}
    assert bits(q_bits=3) == dict.fromkeys((every - changed) | own, 3)


def test_a_fused_projection_s_parts_go_in(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    path = "model.layers.0.self_attn.q_proj"
    parts = FusedParts(("a", "b"), (16, 16), ("b",), repeats=2)
    model, _ = read_model(base)
    attach(model, {path: LayerConfig(4, 6.0, parts=parts)})
    model.model.layers[0].self_attn.q_proj.lora_b += 0.2
    found = fused(base, tmp_path / "out", adapter_of(model))
    np.testing.assert_allclose(np.array(found(IDS)), np.array(model(IDS)), atol=1e-5)


@pytest.mark.usefixtures("exact_memory")
def test_memory_stays_near_one_layer(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    base = write_model(tmp_path / "base", config, bits=4)
    model, adapter = adapted(base)
    mx.eval(adapter.tensors)
    whole = sum(4 * array.size for _, array in tree_flatten(make_model(config).parameters()))
    largest = 4 * 256 * 1024
    del model
    (tmp_path / "out").mkdir()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_fused_model(Fusion(str(base), adapter), tmp_path / "out")
    peak = mx.get_peak_memory() - before
    # The weight, its update, their sum, and what is left over of the layer before.
    assert peak < 5 * largest < whole / 9


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", "embedding-input"), ("dora", "embedding-columns")]
)
def test_an_adapter_of_a_tied_input_alone_is_not_fused(
    method: str, kind: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", QWEN2)
    _, adapter = adapted(base, "embed_tokens", method=method)
    if method == "dora":  # a length a dimension
        adapter.tensors["model.embed_tokens.m"] = mx.ones(64)
    layers = {path: LayerConfig(4, 6.0, method, kind) for path in adapter.layers}
    with pytest.raises(InputError, match="one weight cannot be both"):
        fused(base, tmp_path / "out", Adapter(adapter.tensors, layers))
