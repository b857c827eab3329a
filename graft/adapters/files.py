"""An adapter as a thing: its tensors and the record that describes them, on disk and in a model.

`load_adapter` takes what any tool has written, by `graft.adapters.formats`; what Graft writes is
its own:

`adapters.npz` or `adapters.safetensors` holds `PATH.lora_a` (input_dims, rank) and `PATH.lora_b`
(rank, output_dims) under mlx-lm's names, or what else the layer's method trains; nothing of the
base. `adapter_config.json` beside it tells base model, and per layer rank, alpha, method and kind,
and repeats what mlx-lm reads, so that a folder with a `.safetensors` file of LoRA or DoRA loads
there as it is.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.adapters.attach import attach, detach, lora_layers
from graft.adapters.factors import HALVES, INTERLEAVED, Adapter, guess_kind
from graft.adapters.formats import detect, find_file, read_adapter
from graft.adapters.layer_config import LayerConfig, config_of
from graft.adapters.layer_kinds import FusedParts
from graft.adapters.methods import METHODS, stored_rank
from graft.adapters.rotary import reordered
from graft.errors import InputError
from graft.pretrained.base_config import BaseModel
from graft.pretrained.hub import fetch_from_hub, is_repo_name
from graft.storage.atomic import new_file
from graft.storage.json_file import read_json
from graft.storage.lazy_tensors import Output
from graft.storage.npz import write_npz
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx
import mlx.nn as nn

RECORD_NAME = "adapter_config.json"
FORMAT_VERSION = 1
SUFFIXES = (".npz", ".safetensors")
HUB_FILES = ("adapter*", "ggml-adapter-model.bin", "*.gguf", "README.md")


@dataclass(frozen=True)
class AdapterRecord:
    """What must be known beside the tensors.

    Attributes:
        layers: from module path to rank, alpha, method and kind.
        base_model: the name that the base model was loaded by.
        dropout: while training.
        options: the run that made it, as `graft.training.options.record` gives it.
        rotary: how the rows of q and k are ordered, "halves" or "interleaved"; `None` is as in the
            base model.
    """

    layers: dict[str, LayerConfig]
    base_model: str | None = None
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    rotary: str | None = None


@dataclass(frozen=True)
class LowRankFactors:
    """One layer's update as a product, without the layer.

    Attributes:
        kind: name of one of `graft.adapters.layer_kinds`, which tells what the product means.
        a: A, for a linear layer (input_dims, rank).
        b: B, for a linear layer (rank, output_dims).
        scale: of the product.
        parts: of a fused projection.
    """

    kind: str
    a: mx.array
    b: mx.array
    scale: float
    parts: FusedParts | None = None


def low_rank_factors(
    tensors: Mapping[str, mx.array], record: AdapterRecord, *, name: str
) -> dict[str, LowRankFactors]:
    """A, B and scale of every layer of an adapter, without a model.

    Raises:
        InputError: layers whose method is more than A and B, or tensors that are missing; all of
            them named.
    """
    others = [
        f"{path} ({setting.method}{', a vector' if setting.kind == 'vector' else ''})"
        for path, setting in record.layers.items()
        if not METHODS[setting.method].low_rank or setting.kind == "vector"
    ]
    if others:
        raise InputError(f"adapter {name} is more than low-rank products: {', '.join(others)}")
    halves = [f"{path}.{half}" for path in record.layers for half in ("lora_a", "lora_b")]
    missing = [half for half in halves if half not in tensors]
    if missing:
        raise InputError(f"adapter {name} lacks {', '.join(missing)}")
    return {
        path: LowRankFactors(
            guess_kind(path, setting, tensors[f"{path}.lora_a"]),
            tensors[f"{path}.lora_a"],
            tensors[f"{path}.lora_b"],
            setting.scale,
            setting.parts,
        )
        for path, setting in record.layers.items()
    }


def save_adapter(path: Path, model: nn.Module, record: AdapterRecord | None = None) -> None:
    """Write a model's adapter and its record; each file appears whole or not at all.

    Args:
        path: ends in .npz or .safetensors.
        model: with an adapter attached.
        record: tells what the model does not; its `layers` are taken from the model.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors, or the place cannot be written.
    """
    check_suffix(path)
    # Whatever order the rows had in a file, in a model they have the model's.
    record = replace(record or AdapterRecord({}), layers=layer_settings(model), rotary=None)
    write_adapter(path, adapter_tensors(model), record)


def write_adapter(path: Path, tensors: Mapping[str, mx.array], record: AdapterRecord) -> None:
    """Write tensors and their record; each file appears whole or not at all.

    Args:
        path: ends in .npz or .safetensors.
        tensors: by their paths.
        record: describes them.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors, or the place cannot be written.
    """
    check_suffix(path)
    mx.eval(list(tensors.values()))
    with new_file(path) as temporary:
        if path.suffix == ".npz":
            write_npz(
                temporary, (Output(n, a.dtype, a.shape, iter([a])) for n, a in tensors.items())
            )
        else:
            mx.save_safetensors(str(temporary), dict(tensors), metadata={"format": "mlx"})
    with new_file(path.with_name(RECORD_NAME)) as temporary:
        temporary.write_text(json.dumps(_to_json(record), indent=2) + "\n", encoding="utf-8")


def load_adapter(
    path: Path, *, alpha: float | None = None
) -> tuple[dict[str, mx.array], AdapterRecord]:
    """The tensors and the record of an adapter, whichever tool wrote it.

    Args:
        path: a file, a folder with one, or a Hub name.
        alpha: numerator of the scale for a file that tells none.

    Raises:
        InputError: a file is missing or damaged, the record does not describe the tensors, or the
            adapter asks for what Graft does not do.
    """
    file = find_adapter(path)
    if detect(file) == "graft":
        tensors = read_tensor_file(file)
        record = _from_json(read_json(file.with_name(RECORD_NAME)), file)
        if problems := _contradictions(tensors, record):
            raise InputError(f"{file} and its record do not agree: {'; '.join(problems)}")
        return tensors, record
    adapter = read_adapter(file, alpha=alpha)
    for note in adapter.notes:
        print(f"note: {note}", file=sys.stderr)
    return adapter.tensors, AdapterRecord(
        adapter.layers, adapter.base_model, adapter.dropout, rotary=adapter.rotary
    )


def find_adapter(path: Path) -> Path:
    """The file that an adapter's name means: itself, the one in a folder, or one from the Hub.

    Raises:
        InputError: there is no such adapter.
    """
    check_exists(path)
    return find_file(path if path.exists() else fetch_from_hub(str(path), HUB_FILES))


def is_missing(path: Path) -> bool:
    """Whether an adapter is neither here nor possibly on the Hub.

    A name that ends like an adapter file means a file here.
    """
    names_file = path.suffix in (*SUFFIXES, ".gguf", ".bin")
    return not path.exists() and (names_file or not is_repo_name(str(path)))


def apply_adapter(
    model: nn.Module, tensors: Mapping[str, mx.array], record: AdapterRecord, *, name: str
) -> None:
    """Attach the recorded layers to `model` and fill them with `tensors`.

    Raises:
        InputError: the adapter does not fit the model; every tensor that does not is named, and the
            model is left without an adapter.
    """
    tensors = in_order_of(model, tensors, record)
    modules = dict(model.named_modules())
    problems = [f"the model has no layer {path}" for path in record.layers if path not in modules]
    if not problems:
        try:
            attach(model, record.layers, dropout=record.dropout, for_loading=True)
        except InputError as error:
            problems = [str(error)]
        else:
            problems = _mismatches(adapter_tensors(model), tensors)
    if problems:
        detach(model)
        raise InputError(f"adapter {name} does not fit the model: {'; '.join(problems)}")
    for path, layer in lora_layers(model):
        layer.load({own: tensors[f"{path}.{own}"] for own in layer.tensors()})
        mx.eval(layer.tensors())


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The tensors of a model's adapter by their paths, as a file holds them."""
    return {
        f"{path}.{name}": array
        for path, layer in lora_layers(model)
        for name, array in layer.tensors().items()
    }


def in_order_of(
    model: nn.Module, tensors: Mapping[str, mx.array], record: AdapterRecord
) -> dict[str, mx.array]:
    """An adapter's tensors with the rows of q and k ordered as in `model`.

    Raises:
        InputError: layers that cannot be reordered, named.
    """
    base = BaseModel(record.base_model, getattr(getattr(model, "args", None), "__dict__", {}))
    adapter = Adapter(dict(tensors), record.layers, rotary=record.rotary)
    return reordered(adapter, base.rotary, base.heads).tensors


def layer_settings(model: nn.Module) -> dict[str, LayerConfig]:
    """Rank, alpha, method and kind of each adapted layer of a model."""
    return {path: config_of(layer) for path, layer in lora_layers(model)}


def check_suffix(path: Path) -> None:
    """Refuse a file name that tells no format.

    Raises:
        InputError: the suffix is neither .npz nor .safetensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"adapter file {path}: the name must end in {' or '.join(SUFFIXES)}")


def check_exists(path: Path) -> None:
    """Refuse the name of no adapter; what is on the Hub is found out when it is loaded.

    Raises:
        InputError: there is no such file or folder.
    """
    if is_missing(path):
        raise InputError(f"there is no adapter {path}; train one with --train, or name another")


def _mismatches(expected: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} belongs to no adapted layer" for name in tensors if name not in expected]
    return problems + [
        f"{name} has shape {tensors[name].shape}, the model needs {array.shape}"
        for name, array in expected.items()
        if name in tensors and tensors[name].shape != array.shape
    ]


def _contradictions(tensors: Mapping[str, mx.array], record: AdapterRecord) -> list[str]:
    """What is wrong with tensors and their record, without a model."""
    finite = {name: mx.isfinite(array).all() for name, array in tensors.items()}
    mx.eval(list(finite.values()))
    problems = [f"{n} holds numbers that are not finite" for n, fine in finite.items() if not fine]
    layers = {path: dict[str, mx.array]() for path in record.layers}
    for name, array in tensors.items():
        path, _, own = name.rpartition(".")
        if path in layers:
            layers[path][own] = array
        else:
            problems.append(f"{name} belongs to no adapted layer")
    for path, own_tensors in layers.items():
        problems += _layer_contradictions(path, record.layers[path], own_tensors)
    return problems


def _layer_contradictions(
    path: str, setting: LayerConfig, own: Mapping[str, mx.array]
) -> list[str]:
    if setting.rank < 1 or not math.isfinite(setting.alpha):
        return [f"{path} has rank {setting.rank} and alpha {setting.alpha}"]
    low_rank = METHODS[setting.method].low_rank and setting.kind != "vector"
    needed = ("lora_a", "lora_b") if low_rank else ()
    missing = [f"{path}.{half} is missing" for half in needed if half not in own]
    if missing or not own:
        return missing or [f"{path} has no tensors"]
    if not low_rank or setting.parts is not None or setting.kind == "weight":
        return []
    a, b, rank = own["lora_a"], own["lora_b"], stored_rank(setting.method, setting.rank)
    if a.ndim == b.ndim == 2 and not a.shape[1] == b.shape[0] == rank:
        return [f"{path}: lora_a {a.shape} and lora_b {b.shape} are not of rank {rank}"]
    return []


def _to_json(record: AdapterRecord) -> dict[str, Any]:
    return {
        "format": "graft",
        "format_version": FORMAT_VERSION,
        "base_model": record.base_model,
        "layers": {path: _setting_to_json(setting) for path, setting in record.layers.items()},
        "dropout": record.dropout,
        "options": record.options,
        **({} if record.rotary is None else {"rotary": record.rotary}),
        **_for_mlx_lm(record),
    }


def _for_mlx_lm(record: AdapterRecord) -> dict[str, Any]:
    """What mlx-lm reads. Whole paths as keys make `num_layers` idle.

    It knows one scale for all layers: where they differ it gets nothing, and refuses the folder
    rather than compute something else.
    """
    layers = record.layers.values()
    methods = {setting.method for setting in layers}
    if len({s.scale for s in layers}) > 1:
        return {}
    return {
        "fine_tune_type": "dora" if methods == {"dora"} else "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": max((stored_rank(s.method, s.rank) for s in layers), default=0),
            "scale": max((s.scale for s in layers), default=0.0),
            "dropout": record.dropout,
            "keys": list(record.layers),
        },
    }


def _setting_to_json(setting: LayerConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(setting).items() if value is not None}


def _setting_from_json(content: Mapping[str, Any]) -> LayerConfig:
    """A setting of a record; without a method it is LoRA, without a kind the layer's type tells."""
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


def _from_json(content: Mapping[str, Any], path: Path) -> AdapterRecord:
    where = path.with_name(RECORD_NAME)
    if content.get("format") != "graft":
        raise InputError(f'{where} is not a record of Graft: it has no "format": "graft"')
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {content.get('format_version')}; "
            f"this Graft reads {FORMAT_VERSION}"
        )
    try:
        layers = {p: _setting_from_json(s) for p, s in content["layers"].items()}
        dropout = content["dropout"]
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout!r}")
        rotary = content.get("rotary")
        if rotary not in (None, HALVES, INTERLEAVED):
            raise ValueError(f"rotary {rotary!r}")
        return AdapterRecord(layers, content["base_model"], dropout, content["options"], rotary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} is incomplete: {error!r}") from error
