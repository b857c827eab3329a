"""graft/exporting/describe.py: what it says of an adapter."""

import json
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import load_adapter, save_adapter
from graft.adapters.targets import plan
from graft.cli import inspect as inspecting
from graft.exporting.describe import describe

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import LLAMA, make_model

MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def adapted(config: dict[str, Any], targets: str, method: str) -> nn.Module:
    model = make_model(config)
    attach(model, plan(model, targets, rank=4, alpha=6.0, method=method, num_layers=-1))
    for number, (_, layer) in enumerate(lora_layers(model)):
        for name in layer.tensors():
            noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
            layer[name] = layer[name] + 0.1 * noise
    return model


@pytest.mark.parametrize(
    ("config", "targets", "method"),
    [
        (LLAMA, "all-linear,embed_tokens", "lora"),
        (LLAMA, "q_proj,down_proj", "rslora"),
        (LLAMA, "q_proj,down_proj", "pissa"),
        (MIXTRAL, "all-linear", "lora"),
        (LLAMA, "*norm*", "norm"),
        (LLAMA, "o_proj", "full"),
    ],
)
def test_norms_are_those_of_the_layers_deltas(
    config: dict[str, Any], targets: str, method: str, tmp_path: Path
) -> None:
    model = adapted(config, targets, method)
    path = tmp_path / "adapters.npz"
    save_adapter(path, model, base_model="tiny")
    found = describe(load_adapter(path))["layers"]
    assert found.keys() == dict(lora_layers(model)).keys()
    for name, layer in lora_layers(model):
        expected = np.linalg.norm(np.array(layer.delta()))
        assert found[name]["delta_norm"] == pytest.approx(expected, rel=1e-3)
        assert found[name]["parameters"] == sum(a.size for a in layer.tensors().values())
        assert found[name]["kind"] == layer.kind


def test_the_table_and_json_tell_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adapters.npz"
    save_adapter(path, adapted(LLAMA, "q_proj", "lora"), base_model="tiny")
    assert inspecting.main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["base_model"], found["parameters"]) == ("graft", "tiny", 3 * 512)
    layer = found["layers"]["model.layers.2.self_attn.q_proj"]
    assert (layer["method"], layer["rank"], layer["alpha"], layer["scale"]) == ("lora", 4, 6.0, 1.5)
    assert inspecting.main([str(path)]) == 0
    table = capsys.readouterr().out
    assert "base model: tiny" in table and "3 layers, 1,536 parameters" in table
    assert all(name in table for name in found["layers"])
    assert f"{layer['delta_norm']:.4g}" in table


def test_what_is_no_adapter_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK junk")
    assert inspecting.main([str(tmp_path / "x.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert inspecting.main([str(tmp_path / "gone.npz")]) == 2
    assert "there is no adapter" in capsys.readouterr().err
