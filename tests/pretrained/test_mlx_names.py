"""Tensors take mlx-lm's names without being read, or are computed one at a time."""

from pathlib import Path
from typing import Any

import convert
from graft.errors import InputError
from graft.pretrained.load import build_model
from graft.pretrained.mlx_names import translated, under_mlx_names
from graft.storage.lazy_tensors import ComputedTensor, StoredTensor, read
from graft.storage.safetensors import open_safetensors

import mlx.core as mx
import numpy as np
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
    renamed, notes = under_mlx_names(build_model(tiny.QWEN2), tensors, tmp_path / "scratch")
    assert all(isinstance(tensor, StoredTensor) for tensor in renamed.values())
    assert notes == ["not used by the architecture: lm_head.weight"]
    assert not (tmp_path / "scratch").exists()


def test_only_what_mlx_lm_computes_is_computed(tmp_path: Path) -> None:
    source = write_gpt2(tmp_path / "hf")
    tensors: Any = open_safetensors(source / "model.safetensors")
    model = build_model(GPT2)
    renamed, _ = under_mlx_names(model, dict(tensors), tmp_path / "scratch")
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
    with pytest.raises(InputError, match="not those of a mixtral"):
        under_mlx_names(build_model(mixtral), tensors, tmp_path / "scratch")


def write_awq(folder: Path) -> tuple[Path, dict[str, mx.array]]:
    """A Llama quantized as AutoAWQ stores it, and what its q_proj stands for."""
    config = {
        **tiny.LLAMA,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32},
    }
    source = tiny.write_model(folder, config)
    arrays = weights_of(source)
    generator = np.random.default_rng(0)
    values = {}
    for name in [n for n in arrays if n.endswith("_proj.weight")]:
        rows, columns = arrays.pop(name).shape
        path = name.removesuffix(".weight")
        numbers = generator.integers(0, 16, (columns, rows))
        zeros = generator.integers(0, 16, (columns // 32, rows))
        scales = generator.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
        arrays[f"{path}.qweight"] = mx.array(packed(numbers))
        arrays[f"{path}.qzeros"] = mx.array(packed(zeros))
        arrays[f"{path}.scales"] = mx.array(scales)
        whole = (numbers - zeros.repeat(32, axis=0)) * scales.repeat(32, axis=0).astype(np.float32)
        values[path] = mx.array(whole.T)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    return source, values


def packed(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Eight 4-bit numbers of a row in one 32-bit word, in AutoAWQ's order."""
    words = numbers.reshape(len(numbers), -1, 8).astype(np.uint32)
    order = enumerate((0, 4, 1, 5, 2, 6, 3, 7))
    return np.bitwise_or.reduce([words[..., i] << np.uint32(4 * slot) for i, slot in order])


def test_another_tools_quantization_is_translated(tmp_path: Path) -> None:
    source, values = write_awq(tmp_path / "hf")
    convert.convert(tmp_path / "out", hf_path=source)
    weights = weights_of(tmp_path / "out")
    for path, expected in values.items():
        parts = (weights[f"{path}.{name}"] for name in ("weight", "scales", "biases"))
        found = mx.dequantize(*parts, group_size=32, bits=4)
        np.testing.assert_allclose(found, expected, atol=1e-2, err_msg=path)
    with pytest.raises(InputError, match="quantized already, by awq"):
        convert.convert(tmp_path / "again", hf_path=source, quantize=True)


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    config = {**tiny.LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 3}}
    source = tiny.write_model(tmp_path / "hf", config)
    with pytest.raises(InputError, match="in a way mlx-lm cannot read"):
        translated(source)
