"""Tensors take mlx-lm's names without being read, or are computed one at a time."""

from pathlib import Path
from typing import Any

import convert
from graft.errors import InputError
from graft.pretrained.load import build_model
from graft.pretrained.mlx_names import under_mlx_names
from graft.storage.lazy_tensors import ComputedTensor, StoredTensor, read
from graft.storage.safetensors import open_safetensors

import mlx.core as mx
import pytest

from support import tiny
from support.layouts import weights_of

GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 24,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 512,
}


def write_gpt2(folder: Path) -> Path:
    """A GPT-2 as Hugging Face stores it: without the prefix, linear weights transposed."""
    source = tiny.write_model(folder, GPT2)
    arrays = {
        name.removeprefix("model."): array.T if ".c_" in name and array.ndim == 2 else array
        for name, array in weights_of(source).items()
    }
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    return source


def test_renamed_tensors_stay_on_disk_and_dropped_ones_are_said(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "hf", tiny.QWEN2)
    tensors: Any = open_safetensors(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    renamed, notes = under_mlx_names(
        build_model(tiny.QWEN2), tensors, tmp_path / "scratch", source="a folder"
    )
    assert all(isinstance(tensor, StoredTensor) for tensor in renamed.values())
    assert notes == ["not used by the architecture: lm_head.weight"]
    assert not (tmp_path / "scratch").exists()


def test_only_what_mlx_lm_computes_is_computed(tmp_path: Path) -> None:
    source = write_gpt2(tmp_path / "hf")
    tensors: Any = open_safetensors(source / "model.safetensors")
    model = build_model(GPT2)
    renamed, _ = under_mlx_names(model, dict(tensors), tmp_path / "scratch", source="a folder")
    stored = {name for name, tensor in renamed.items() if isinstance(tensor, StoredTensor)}
    assert "model.wte.weight" in stored
    assert "model.h.0.attn.c_attn.weight" not in stored
    for name, expected in model.sanitize(weights_of(source)).items():
        assert mx.array_equal(read(renamed[name]), expected), name


@pytest.mark.usefixtures("exact_memory")
def test_computed_tensors_are_let_go_one_by_one(tmp_path: Path) -> None:
    source = write_gpt2(tmp_path / "hf")
    size = (source / "model.safetensors").stat().st_size
    assert size > 70e6
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    convert.convert(tmp_path / "out", hf_path=source, quantize=True)
    assert mx.get_peak_memory() - held < 0.2 * size


def test_tensors_of_another_architecture_are_refused(tmp_path: Path) -> None:
    mixtral = {**tiny.LLAMA, "model_type": "mixtral", "num_local_experts": 2}
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors: Any = {expert: ComputedTensor(mx.zeros((4, 4)))}
    with pytest.raises(InputError, match="the weights in a folder are not those of a mixtral"):
        under_mlx_names(build_model(mixtral), tensors, tmp_path / "scratch", source="a folder")
