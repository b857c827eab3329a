"""graft/adapters/formats/ggla.py: llama.cpp's files of 2023."""

from pathlib import Path

import graft  # noqa: F401
from graft.adapters.files import load_adapter

import numpy as np
import pytest

from support.adapter_cases import deltas, ggla, normal
from support.tiny import LLAMA


@pytest.mark.parametrize("names", ["blk.0.attn_", "layers.0.attention.w"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_ggla_file_made_byte_by_byte(tmp_path: Path, names: str, dtype: str) -> None:
    a = {key: np.array(normal(64, 2, seed=n)).astype(dtype) for n, key in enumerate("qv")}
    b = {"q": np.array(normal(64, 2, seed=8)), "v": np.array(normal(32, 2, seed=9))}
    content = {}
    for key in "qv":
        content[f"{names}{key}.weight.loraA"] = a[key]
        content[f"{names}{key}.weight.loraB"] = b[key]
    (tmp_path / "ggml-adapter-model.bin").write_bytes(ggla(content))
    found = deltas(load_adapter(tmp_path), {**LLAMA, "rope_traditional": True})
    for key in "qv":
        expected = 3 * b[key] @ a[key].astype(np.float32).T
        path = f"model.layers.0.self_attn.{key}_proj"
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6)
