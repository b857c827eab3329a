"""Models quantized by other tools (AWQ, GPTQ, MXFP4, ...), in the form of MLX."""

from pathlib import Path
from typing import Any

from graft.console import one_line
from graft.errors import InputError
from graft.pretrained.mlx_names import parameters_of
from graft.storage.lazy_tensors import ComputedTensor, LazyTensor

import mlx.nn as nn


def quantizer_of(config: dict[str, Any]) -> str | None:
    """What quantized a model: "MLX", another tool's method, or `None` if it is not quantized."""
    if "quantization" in config:
        return "MLX"
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    theirs = config.get("quantization_config") or nested
    return str(theirs.get("quant_method")) if isinstance(theirs, dict) else None


def is_foreign(config: dict[str, Any]) -> bool:
    """Whether another tool quantized a model."""
    return quantizer_of(config) not in (None, "MLX")


def load_foreign(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model in MLX's form with weights that are not evaluated yet, and its new configuration.

    Args:
        folder: the model's.
        config: the model's configuration.

    Raises:
        InputError: mlx-lm cannot read this kind of quantization.
    """
    from mlx_lm.utils import load_model

    try:
        model, config = load_model(folder, lazy=True, model_config=config)
    except Exception as error:  # mlx-lm checks little before it begins
        raise InputError(
            f"{folder} is quantized in a way mlx-lm cannot read: {one_line(error)}"
        ) from error
    if "quantization" not in config:  # mlx-lm dequantized the weights
        config.pop("quantization_config", None)
    return model, config


def open_foreign(
    folder: Path, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The new configuration of a model, and its tensors in MLX's form, computed when they are read.

    Raises:
        InputError: mlx-lm cannot read this kind of quantization.
    """
    model, config = load_foreign(folder, config)
    return config, {name: ComputedTensor(array) for name, array in parameters_of(model).items()}
