"""Models that other tools quantized."""

from pathlib import Path
from typing import Any

import convert
from graft.errors import InputError
from graft.pretrained.foreign_quantization import is_foreign, open_foreign, quantizer_of
from graft.pretrained.load import read_model

import mlx.core as mx
import numpy as np
import pytest

from support import tiny
from support.layouts import TOKENS, logits_of, weights_of


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
    ],
)
def test_the_configuration_names_the_quantizer(
    config: dict[str, Any], quantizer: str | None
) -> None:
    assert quantizer_of(config) == quantizer
    assert is_foreign(config) == (quantizer in ("awq", "gptq"))


def test_a_foreign_model_loads_as_it_converts(tmp_path: Path) -> None:
    source, _ = write_awq(tmp_path / "hf")
    convert.convert(tmp_path / "out", hf_path=source)
    model, config = read_model(source)
    assert "quantization" in config
    np.testing.assert_allclose(np.array(model(TOKENS)), logits_of(tmp_path / "out"), atol=1e-4)


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
        open_foreign(source, config)
