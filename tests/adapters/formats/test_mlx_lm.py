"""graft/adapters/formats/mlx_lm.py: one rank and one scale for all layers."""

from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import adapter_of, apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import load_adapter, read_adapter
from graft.adapters.formats.mlx_lm import write_mlx_lm
from graft.adapters.layer_config import LayerConfig
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig

import mlx.core as mx
import numpy as np
import pytest

from support.adapter_cases import (
    BASE,
    K,
    Q,
    change,
    embedding_adapter,
    logits,
    make_adapter,
    refusal,
    write,
)
from support.tiny import LLAMA, QWEN2, make_model


def test_a_form_with_one_rank_pads_and_says_so(tmp_path: Path) -> None:
    adapter = make_adapter({Q: LayerConfig(2, 3.0), K: LayerConfig(8, 12.0)})
    notes = write_mlx_lm(adapter, tmp_path / "out", base=BASE)
    assert notes == ["padded with zeros to rank 8: 1 layers (exact, but larger)"]
    tensors = read_adapter(tmp_path / "out" / "adapters.safetensors").tensors
    assert mx.array_equal(tensors[f"{Q}.lora_a"][:, :2], adapter.tensors[f"{Q}.lora_a"])
    assert not tensors[f"{Q}.lora_a"][:, 2:].any()


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["untied", "tied"])
def test_an_embedding_of_mlx_lm_works_after_it_went_through_graft_s_own_form(
    config: dict[str, Any], tmp_path: Path
) -> None:
    adapter = embedding_adapter(config)
    write_mlx_lm(adapter, tmp_path / "mlx-lm", base=BaseConfig("base", config))
    place = write("npz", load_adapter(tmp_path / "mlx-lm"), tmp_path)
    np.testing.assert_array_equal(logits(load_adapter(place), config), logits(adapter, config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fine_tune_type": "full"}, "'full'"),
        ({"lora_parameters": {"rank": 4, "alpha": 6}}, "scale None"),
        ({"lora_parameters": {"rank": 4, "scale": "1"}}, "scale '1'"),
        ({"fine_tune_type": "dora"}, f"{Q}.m"),
    ],
)
def test_mlx_lm_folders_that_are_no_lora_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = write("mlx-lm", make_adapter(), tmp_path)
    change(folder / "adapter_config.json", **changes)
    assert named in refusal(lambda: load_adapter(folder))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_padded_export_is_read_back_although_a_router_is_narrower(
    method: str, tmp_path: Path
) -> None:
    """mlx-lm has one rank for all layers: 8 for a router with four outputs."""
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    targets = {"model.layers.0.self_attn.q_proj": 8, "model.layers.0.block_sparse_moe.gate": 4}
    model = make_model(config)
    attach(model, {path: LayerConfig(rank, 6.0, method) for path, rank in targets.items()})
    for number, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    model.eval()
    write_mlx_lm(adapter_of(model), tmp_path / "a", base=BaseConfig("base", config))
    again = load_adapter(tmp_path / "a")
    assert {layer.rank for layer in again.layers.values()} == {8}
    other = make_model(config)
    apply_adapter(other, again, name="again")
    other.eval()
    tokens = mx.array([[1, 5, 9, 300, 7]])
    np.testing.assert_allclose(np.array(other(tokens)), np.array(model(tokens)), atol=1e-5)
    with pytest.raises(InputError, match="give 1 to 4"):
        attach(make_model(config), again.layers)
