"""graft/exporting/extract.py: the difference between two models as an adapter."""

from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import apply_adapter
from graft.adapters.files import load_adapter
from graft.cli.extract import main as extract_command
from graft.errors import InputError
from graft.exporting.extract import extract
from graft.exporting.fused_model import Fusion, write_fused_model
from graft.pretrained.load import read_model

import mlx.core as mx
import numpy as np
import pytest

from support.merge_cases import IDS, MIXTRAL, deltas, make_adapter
from support.tiny import LLAMA, QWEN2, write_model


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, MIXTRAL])
def test_extract_finds_the_adapter_that_was_fused(
    config: dict[str, Any], bits: int | None, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", config, bits=bits)
    adapter = make_adapter(1, config=config, targets="all-linear,embed_tokens")
    (tmp_path / "tuned").mkdir()
    write_fused_model(Fusion(str(base), adapter, dequantize=True), tmp_path / "tuned")
    found, losses, notes = extract(str(base), str(tmp_path / "tuned"), rank=4)
    assert found.layers.keys() == adapter.layers.keys() and notes == []
    assert max(losses.values()) < 1e-4
    expected, seen = deltas(adapter, config), deltas(found, config)
    for path, delta in expected.items():
        np.testing.assert_allclose(seen[path], delta, atol=1e-3)


def test_extract_keeps_norms_whole_and_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = (write_model(tmp_path / n) for n in ("base", "tuned"))
    weights = mx.load(str(tuned / "model.safetensors"))
    norm, q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    changed = {norm: weights[norm] + 0.25, q: weights[q] + 0.1 * mx.random.normal((64, 64))}
    mx.save_safetensors(str(tuned / "model.safetensors"), {**weights, **changed})
    names = ["--base", str(base), "--tuned", str(tuned)]
    out = ["--rank", "64", "--out", str(tmp_path / "out" / "a.npz")]
    assert extract_command([*names, *out]) == 0
    assert "energy lost: mean 0.00%" in capsys.readouterr().out
    model, _ = read_model(base)
    apply_adapter(model, load_adapter(tmp_path / "out" / "a.npz"), name="a")
    model.eval()
    np.testing.assert_allclose(np.array(model(IDS)), np.array(read_model(tuned)[0](IDS)), atol=1e-4)


def test_extract_refuses_models_that_are_equal_or_of_two_kinds(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    other = write_model(tmp_path / "other", {**LLAMA, "intermediate_size": 96})
    with pytest.raises(InputError, match="do not differ"):
        extract(str(base), str(base), rank=2)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj"):
        extract(str(base), str(other), rank=2)
