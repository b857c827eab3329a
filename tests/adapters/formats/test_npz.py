"""graft/adapters/formats/npz.py: the MLX example's files, of both generations."""

from pathlib import Path

import graft  # noqa: F401
from graft.adapters.files import load_adapter

import mlx.core as mx
import numpy as np
import pytest

from support.adapter_cases import Q, deltas, normal, old_npz
from support.tiny import LLAMA


def test_the_old_npz_has_scale_2_and_interleaved_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = old_npz(tmp_path / "adapters.npz")
    adapter = load_adapter(tmp_path / "adapters.npz")
    said = capsys.readouterr().err
    assert "rank 8 from the shapes" in said and "scale 2," in said
    found = deltas(adapter, {**LLAMA, "rope_traditional": True})
    q, v = "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
    expected = {
        ours: 2 * (tensors[f"{theirs}.lora_a"] @ tensors[f"{theirs}.lora_b"]).T
        for ours, theirs in ((q, "layers.1.attention.wq"), (v, "layers.2.attention.wv"))
    }
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-4, atol=1e-5)
    halves = deltas(adapter)  # over a base in Hugging Face's order, q has its rows moved
    moved = expected[q].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_allclose(halves[q], moved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(halves[v], expected[v], rtol=1e-4, atol=1e-5)


def test_the_later_npz_has_scale_20_or_what_alpha_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (np.array(normal(*shape, seed=3)) for shape in ((64, 8), (8, 64)))
    np.savez(tmp_path / "adapters.npz", **{f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    found = deltas(load_adapter(tmp_path / "adapters.npz"))
    assert "scale 20," in capsys.readouterr().err
    np.testing.assert_allclose(found[Q], 20 * (a @ b).T, rtol=1e-4, atol=1e-5)
    adapter = load_adapter(tmp_path / "adapters.npz", alpha=4.0)
    assert adapter.layers[Q].alpha == 4.0
    assert "alpha 4" in capsys.readouterr().err
    assert mx.array_equal(adapter.tensors[f"{Q}.lora_a"], mx.array(a))
