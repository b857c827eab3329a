"""Graft's own adapter files: the tensors, and a record beside them that describes every layer.

`adapters.npz` or `adapters.safetensors` holds `PATH.lora_a` (input_dims, rank) and `PATH.lora_b`
(rank, output_dims) under mlx-lm's names, or whatever else the layer's method trains; nothing of the
base model. `adapter_config.json` beside it holds the base model and, per layer, rank, alpha, method
and kind. It repeats what mlx-lm reads, so that a folder with a `.safetensors` file of LoRA or DoRA
loads there as it is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, is_dropout
from graft.adapters.factors import recorded_kind
from graft.adapters.formats import RECORD_NAME, Format, Usage, register_format
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import WEIGHT, FusedParts
from graft.adapters.methods import METHODS, stored_rank
from graft.adapters.rotary import REORDERINGS
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig
from graft.storage.atomic import check_writable, new_file
from graft.storage.json_file import read_json_file
from graft.storage.lazy_tensors import Output
from graft.storage.npz import write_npz
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx

FORMAT_VERSION = 1
# The first is the one that is written into a folder.
_WRITTEN_SUFFIXES = (".npz", ".safetensors")


def check_suffix(path: Path) -> None:
    """Refuse a file name without a suffix that says how to write it.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors.
    """
    if path.suffix not in _WRITTEN_SUFFIXES:
        suffixes = " or ".join(_WRITTEN_SUFFIXES)
        raise InputError(f"adapter file {path}: the name must end in {suffixes}")


# ---- writing ---------------------------------------------------------------------------------


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write an adapter and its record; each file appears whole or not at all.

    Args:
        path: ends in .npz or .safetensors.
        adapter: to be written.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors, or the path cannot be written.
    """
    check_suffix(path)
    tensors = adapter.tensors
    mx.eval(list(tensors.values()))
    with new_file(path) as temporary:
        if path.suffix == ".npz":
            write_npz(
                temporary, (Output(n, a.dtype, a.shape, iter([a])) for n, a in tensors.items())
            )
        else:
            mx.save_safetensors(str(temporary), tensors, metadata={"format": "mlx"})
    with new_file(path.with_name(RECORD_NAME)) as temporary:
        temporary.write_text(json.dumps(_to_json(adapter), indent=2) + "\n", encoding="utf-8")


def export_adapter(
    adapter: Adapter, out: Path, *, base: BaseConfig | None = None, force: bool = False
) -> list[str]:
    """Write an adapter to a file, or to a folder; nothing has to be changed to fit.

    Raises:
        InputError: the file exists and `force` is false, or it cannot be written.
    """
    file = out if out.suffix in _WRITTEN_SUFFIXES else out / f"adapters{_WRITTEN_SUFFIXES[0]}"
    if file.exists() and not force:
        raise InputError(f"{file} exists; name another path, or add --force to replace it")
    check_writable(file)
    write_adapter(file, adapter)
    return []


def _to_json(adapter: Adapter) -> dict[str, Any]:
    return {
        "format": "graft",
        "format_version": FORMAT_VERSION,
        "base_model": adapter.base_model,
        "layers": {path: config_to_json(config) for path, config in adapter.layers.items()},
        "dropout": adapter.dropout,
        "options": adapter.options,
        **({"row_shapes": list(adapter.row_shapes)} if adapter.row_shapes else {}),
        **({} if adapter.rotary is None else {"rotary": adapter.rotary}),
        **_for_mlx_lm(adapter),
    }


def config_to_json(config: LayerConfig) -> dict[str, Any]:
    """A layer as a record holds it."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def _for_mlx_lm(adapter: Adapter) -> dict[str, Any]:
    """What mlx-lm reads. Its keys are whole paths, so `num_layers` has no effect.

    It has one scale for all layers: if scales differ it gets nothing, and refuses the folder
    instead of computing something else.
    """
    configs = adapter.layers.values()
    dora = bool(configs) and all(METHODS[config.method].has_magnitude for config in configs)
    scales = {config.scale for config in configs}
    if len(scales) > 1:
        return {}
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": max((stored_rank(c.method, c.rank) for c in configs), default=0),
            "scale": max(scales, default=0.0),
            "dropout": adapter.dropout,
            "keys": list(adapter.layers),
        },
    }


# ---- reading ---------------------------------------------------------------------------------


def read_graft(path: Path) -> Adapter:
    """An adapter that Graft wrote.

    Raises:
        InputError: a file is missing or damaged, or the record does not describe the tensors.
    """
    tensors = read_tensor_file(path)
    adapter = _from_json(read_json_file(path.with_name(RECORD_NAME)), tensors, path)
    if problems := _contradictions(adapter):
        raise InputError(f"{path} and its record do not agree: {'; '.join(problems)}")
    return adapter


def _from_json(content: Mapping[str, Any], tensors: dict[str, mx.array], path: Path) -> Adapter:
    record = path.with_name(RECORD_NAME)
    if content.get("format") != "graft":
        raise InputError(f'{record} is not a record of Graft: it has no "format": "graft"')
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{record} has format_version {content.get('format_version')}; "
            f"this Graft reads {FORMAT_VERSION}"
        )
    try:
        layers = {p: config_from_json(config) for p, config in content["layers"].items()}
        dropout, rotary = content["dropout"], content.get("rotary")
        if not is_dropout(dropout):
            raise ValueError(f"dropout {dropout!r}")
        if rotary not in (None, *REORDERINGS):
            raise ValueError(f"rotary {rotary!r}")
        base_model, options = content["base_model"], content["options"]
        if not isinstance(base_model, str | None) or not isinstance(options, dict):
            raise TypeError("base_model and options are not a text and an object")
        row_shapes = tuple(map(str, content.get("row_shapes") or ()))
        return Adapter(tensors, layers, base_model, dropout, rotary, options, row_shapes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{record} is incomplete or damaged: {error!r}") from error


def config_from_json(content: Mapping[str, Any]) -> LayerConfig:
    """A layer of a record; without a method it is LoRA, without a kind the layer's type decides.

    Raises:
        KeyError, TypeError, ValueError: the record is incomplete or wrong.
    """
    rank, alpha = content["rank"], content["alpha"]
    method, kind = content.get("method", "lora"), content.get("kind")
    if type(rank) is not int or type(alpha) not in (int, float) or method not in METHODS:
        raise ValueError(f"rank {rank!r}, alpha {alpha!r}, method {method!r}")
    if kind not in (None, *METHODS[method].kinds):
        raise ValueError(f"kind {kind!r} with method {method!r}")
    parts = content.get("parts")
    if parts is not None:
        names, sizes, enabled = (tuple(parts[key]) for key in ("names", "sizes", "enabled"))
        parts = FusedParts(names, sizes, enabled, parts["repeats"])
    return LayerConfig(rank, float(alpha), method, kind, parts)


def _contradictions(adapter: Adapter) -> list[str]:
    """Where tensors and their record contradict each other, as far as it shows without a model."""
    finite = {name: mx.isfinite(array).all() for name, array in adapter.tensors.items()}
    mx.eval(list(finite.values()))
    problems = [f"{n} holds numbers that are not finite" for n, fine in finite.items() if not fine]
    layers = {path: dict[str, mx.array]() for path in adapter.layers}
    for name, array in adapter.tensors.items():
        path, _, key = name.rpartition(".")
        if path in layers:
            layers[path][key] = array
        else:
            problems.append(f"{name} belongs to no adapted layer")
    for path, tensors in layers.items():
        problems += _layer_contradictions(path, adapter.layers[path], tensors)
    return problems


def _layer_contradictions(
    path: str, config: LayerConfig, tensors: Mapping[str, mx.array]
) -> list[str]:
    if config.rank < 1 or not math.isfinite(config.alpha):
        return [f"{path} has rank {config.rank} and alpha {config.alpha}"]
    kind = recorded_kind(path, config, tensors.get("lora_a"))
    low_rank = METHODS[config.method].low_rank and kind.ranked
    needed = ("lora_a", "lora_b") if low_rank else ()
    missing = [f"{path}.{half} is missing" for half in needed if half not in tensors]
    if missing or not tensors:
        return missing or [f"{path} has no tensors"]
    if not low_rank or config.parts is not None or kind is WEIGHT:
        return []
    a, b, rank = tensors["lora_a"], tensors["lora_b"], stored_rank(config.method, config.rank)
    if a.ndim == b.ndim == 2 and not a.shape[1] == b.shape[0] == rank:
        return [f"{path}: lora_a {a.shape} and lora_b {b.shape} are not of rank {rank}"]
    return []


register_format(
    Format(
        name="graft",
        aliases=("npz",),
        files=("adapters.safetensors", "adapters.npz"),
        companions=(RECORD_NAME,),
        embedded_by_default=True,
        recognizes=lambda start, config: "format" in config,
        read=lambda path, alpha: read_graft(path),
        write=export_adapter,
        usage=Usage(
            "Graft",
            "mlx",
            """\
```console
$ python lora.py --model {base} --adapter-file {name} --prompt "Hello"
```""",
        ),
    )
)
