"""Loads a model with its tokenizer, from a folder or from the Hub.

The architectures come from mlx-lm.
"""

import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.console import note
from graft.errors import InputError, first_line
from graft.pretrained.context_length import context_length
from graft.pretrained.folder import find_folder, read_folder
from graft.pretrained.foreign_quantization import is_foreign, load_foreign
from graft.pretrained.known_differences import check_differences
from graft.pretrained.mlx_names import parameters_of, sanitized
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer
from graft.pretrained.vocabulary import check_tokenizer
from graft.runtime import cpu
from graft.storage.json_file import read_json_file
from graft.storage.lazy_tensors import check_fit

import mlx.core as mx
import mlx.nn as nn

FINGERPRINT_VERSION = 2
# Counts in a configuration that decide how many modules are built; real ones are below a thousand.
_COUNTS, _LARGEST_COUNT = re.compile(r"(layers?|blocks?|experts?|depth)$"), 10_000


def load_model(name: str | Path | None = None) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """Load a model with its tokenizer.

    Args:
        name: a folder, a Hub repository, or `None` for the included base model.

    Returns:
        The model in evaluation mode, its tokenizer and its configuration.

    Raises:
        InputError: there is no such model, it cannot be read, or its tokenizer is of another model.
    """
    folder = find_folder(name)
    model, config = read_model(folder)
    for text in check_differences(model, config):
        note(text)
    model.context_tokens = context_length(config)
    model.loaded_from = None if name is None else str(name)
    tokenizer = load_tokenizer(folder, config.get("eos_token_id"))
    check_tokenizer(model, tokenizer, folder)
    return model, tokenizer, config


def read_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the architecture of a model folder and load its weights, in evaluation mode.

    Raises:
        InputError: an unknown architecture, unreadable files, or tensors that are missing, unknown
            or of another shape; all of them are named.
    """
    cpu.check_compiler()
    config, weights = read_folder(folder)
    config = _with_end_tokens(config, folder)
    if is_foreign(config):
        model, config = load_foreign(folder, config)
        return _ready(model), config
    model = build_model(config)
    weights = sanitized(model, weights, str(folder))
    if "quantization" in config:
        quantize_as_saved(model, config["quantization"], weights)
    check_fit(parameters_of(model), weights, str(folder))
    model.load_weights(list(weights.items()))
    check_runs(model, config)
    try:
        return _ready(model), config
    except RuntimeError as error:  # for example out of memory
        raise InputError(f"cannot load the weights in {folder}: {first_line(error)}") from error


def fingerprint(parameters: Mapping[str, mx.array]) -> str:
    """A hash that identifies a model: names, shapes, types and contents of its arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters.items()):
        # A fraction of the time of a hash over gigabytes, and no accident goes unnoticed by it.
        content = zlib.crc32(memoryview(array.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
        digest.update(repr((name, array.shape, str(array.dtype), content)).encode())
    return f"{FINGERPRINT_VERSION}:{digest.hexdigest()}"


def former_fingerprint(parameters: Mapping[str, mx.array]) -> str:
    """The fingerprint in checkpoints of earlier versions, which had some values of each array."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters.items()):
        values = array.reshape(-1)[:256].astype(mx.float32).tolist()
        digest.update(repr((name, array.shape, str(array.dtype), values)).encode())
    return digest.hexdigest()


def build_model(config: dict[str, Any]) -> nn.Module:
    """The architecture of mlx-lm that a configuration describes, with random weights.

    Raises:
        InputError: mlx-lm has no such architecture, or the configuration is incomplete or invalid.
    """
    from mlx_lm.utils import _get_classes

    if "model_type" not in config:
        raise InputError("config.json has no model_type")
    _check_counts(config)
    try:
        model_class, args_class = _get_classes(config)
    except (ValueError, AttributeError, TypeError) as error:
        # No such module, a module without an architecture, or a name that is not text.
        raise InputError(
            f"unknown architecture {config['model_type']!r}: mlx-lm has none"
        ) from error
    except (ImportError, SystemExit) as error:  # a module of mlx-lm ends the process
        raise InputError(
            f"mlx-lm needs another package for the architecture {config['model_type']}"
        ) from error
    try:
        model: nn.Module = model_class(args_class.from_dict(config))
    except Exception as error:  # every architecture fails in its own way
        raise InputError(
            f"config.json does not describe a {config['model_type']}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(model, "_no_grad"):
        # An architecture that never calls nn.Module's constructor, as recurrent_gemma.
        nn.Module.__init__(model)
    return model


def check_runs(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse a model whose settings fail only when it is used; nothing is computed.

    Raises:
        InputError: a setting has a type that no computation takes.
    """
    try:
        model(mx.array([[0]]))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"config.json does not describe a {config['model_type']} that runs: {first_line(error)}"
        ) from error
    except Exception:  # some architectures need a cache, or more than token ids
        return


def _check_counts(config: Mapping[str, Any]) -> None:
    """Refuse more layers, blocks or experts than any model has: building them could take forever.

    Raises:
        InputError: a count is above `_LARGEST_COUNT`.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif _COUNTS.search(str(name)) and isinstance(value, int) and value > _LARGEST_COUNT:
            raise InputError(f"config.json: {name} is {value:,}, above {_LARGEST_COUNT:,}")


def _with_end_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with all ids that end a text, which generation_config.json lists."""
    file = folder / "generation_config.json"
    listed = read_json_file(file).get("eos_token_id") if file.is_file() else None
    ids = config.get("eos_token_id") if listed is None else listed
    tokens = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int and token < 2**31 for token in tokens):
        name = "config.json" if listed is None else file.name
        raise InputError(f"{folder}/{name}: eos_token_id {str(ids)[:80]} is not a list of tokens")
    if listed is None and all(token >= 0 for token in tokens):
        return config
    return config | {"eos_token_id": [token for token in tokens if token >= 0]}  # -1 is none


def _ready(model: nn.Module) -> nn.Module:
    cpu.suit_backend(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def quantize_as_saved(model: nn.Module, quantization: Any, weights: dict[str, mx.array]) -> None:
    """Quantize the layers that a checkpoint has quantized, before its weights are loaded.

    Each has the settings that `quantization` lists for its path, or else those that the shapes of
    its tensors show.

    Raises:
        InputError: the settings are incomplete or impossible.
    """
    from mlx_lm.utils import infer_quant_config

    def settings_of(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            listed: bool | dict[str, Any] = quantization[path]
            return listed
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        inferred: dict[str, Any] = infer_quant_config(path, module, weights)
        return inferred

    try:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=settings_of,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"config.json: bad quantization {quantization!r}: {error}") from error
