import json
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import layer_configs
from graft.adapters.attach import attach
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.training.setup import read_unquantized_weights, start_adapter

import mlx.core as mx
import pytest

from support.tiny import LLAMA, make_model, write_model

BLOCK = "model.layers.2"


def test_loftq_corrects_the_rounding_of_a_run_s_model(tmp_path: Path) -> None:

    whole = write_model(tmp_path / "whole", LLAMA)
    packed = write_model(tmp_path / "packed", LLAMA, bits=2)
    from graft.pretrained.load import read_model
    from graft.training.options import from_mapping

    errors = {}
    for method in ("lora", "loftq"):
        model, _ = read_model(packed)
        options = from_mapping({"method": method, "rank": 16, "original_model": str(whole)})
        start_adapter(model, options)
        assert {config.method for config in layer_configs(model).values()} == {method}
        layer = model.model.layers[0].mlp.up_proj
        original = read_model(whole)[0].model.layers[0].mlp.up_proj.weight
        errors[method] = mx.linalg.norm(layer.fuse(dequantize=True).weight - original).item()
    assert errors["loftq"] < 0.8 * errors["lora"]


@pytest.mark.parametrize("original", [None, "packed", "other"])
def test_loftq_needs_the_model_before_quantization(original: str | None, tmp_path: Path) -> None:
    from graft.pretrained.load import read_model

    write_model(tmp_path / "packed", LLAMA, bits=4)
    write_model(tmp_path / "other", {**LLAMA, "num_hidden_layers": 1})
    model, _ = read_model(tmp_path / "packed")
    settings = plan(model, "q_proj", method="loftq")
    name = None if original is None else str(tmp_path / original)
    with pytest.raises(InputError, match="--original-model"):
        read_unquantized_weights(name, settings)
    with pytest.raises(InputError, match=r"before quantization of model\.layers\.0"):
        attach(model, settings)


def test_the_record_of_a_run_has_its_patterns(tmp_path: Path) -> None:
    from graft.adapters.files import save_adapter
    from graft.training.options import from_mapping

    model = make_model(LLAMA)
    options = from_mapping({"targets": "q_proj,model.norm", "rank_pattern": "q_proj=2"})
    save_adapter(tmp_path / "a.npz", model, **start_adapter(model, options)[1])
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["layers"]["model.norm"] == {
        "rank": 1,
        "alpha": 1.0,
        "method": "lora",
        "kind": "vector",
    }
    assert content["layers"][f"{BLOCK}.self_attn.q_proj"]["rank"] == 2
    assert content["options"]["rank_pattern"] == "q_proj=2"
