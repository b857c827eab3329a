"""mlx-lm's adapter folders: adapters.safetensors and adapter_config.json.

All layers share one rank and one scale. The keys are whole paths, so any subset of the layers can
be adapted.

Reference: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, is_dropout, reordered
from graft.adapters.factors import Factors, factors_at_scale, factors_of, from_factors, paired
from graft.adapters.formats import RECORD_NAME, Format, Usage, register_format
from graft.adapters.layer_kinds import EMBEDDING, EMBEDDING_INPUT, EXPERTS, LINEAR
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig
from graft.storage.atomic import new_folder
from graft.storage.json_file import read_json_file
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx

_TENSORS = "adapters.safetensors"
_SUFFIXES = {".lora_a": "a", ".lora_b": "b", ".m": "m"}
_KINDS = (LINEAR, EMBEDDING, EMBEDDING_INPUT, EXPERTS)


def read_mlx_lm(path: Path) -> Adapter:
    """A folder's file of tensors, with the configuration beside it.

    Raises:
        InputError: a file is missing or damaged, or it is neither LoRA nor DoRA.
    """
    record = path.with_name(RECORD_NAME)
    config = read_json_file(record)
    method = config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise InputError(f"{record}: fine_tune_type {method!r}: Graft reads lora and dora")
    scale, dropout = _read_parameters(config, record)
    pairs, unknown = paired(read_tensor_file(path), _SUFFIXES)
    unknown += [
        f"{name}.m" for name, halves in pairs.items() if ("m" in halves) != (method == "dora")
    ]
    if unknown or not pairs:
        names = ", ".join(unknown) or "nothing"
        raise InputError(f"{path} is not {method} of mlx-lm: unexpected or missing: {names}")
    model = config.get("model")
    return from_factors(
        {name: factors_at_scale(name, halves, scale) for name, halves in pairs.items()},
        base_model=model if isinstance(model, str) else None,
        dropout=dropout,
    )


def _read_parameters(config: Mapping[str, Any], record: Path) -> tuple[float, float]:
    """Scale and dropout."""
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, dropout = parameters.get("scale"), parameters.get("dropout", 0.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(f"{record}: lora_parameters has scale {scale!r}; it must be a number")
    if not is_dropout(dropout):
        raise InputError(f"{record}: lora_parameters has dropout {dropout!r}; give 0 to below 1")
    return float(scale), float(dropout)


def write_mlx_lm(
    adapter: Adapter, out: Path, *, base: BaseConfig | None = None, force: bool = False
) -> list[str]:
    """Write a folder that mlx-lm loads; returns what was changed to fit, a line each.

    Raises:
        InputError: layers that mlx-lm has no adapter for, or a path that cannot be written.
    """
    if base is not None:
        adapter = reordered(adapter, base.rotary, base.heads)
    elif adapter.rotary is not None:
        raise InputError(
            "the rows of q and k depend on the base model that mlx-lm runs: name it with --model"
        )
    factors = factors_of(adapter, holder="mlx-lm", kinds=_KINDS, dora=True)
    _check_embeddings(factors, base)
    dora = sorted(path for path, layer in factors.items() if layer.magnitude is not None)
    if dora and len(dora) < len(factors):
        raise InputError(
            f"mlx-lm has DoRA for all layers or none; these layers have it: {', '.join(dora)}"
        )
    factors, notes = uniform(factors)
    tensors = {f"{path}.lora_a": layer.a for path, layer in factors.items()}
    tensors |= {f"{path}.lora_b": layer.b for path, layer in factors.items()}
    tensors |= {f"{path}.m": m for path, f in factors.items() if (m := f.magnitude) is not None}
    config = _config(adapter, factors, dora=bool(dora))
    with new_folder(out, replace=force) as folder:
        mx.save_safetensors(str(folder / _TENSORS), tensors, metadata={"format": "mlx"})
        (folder / RECORD_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def _config(adapter: Adapter, factors: Mapping[str, Factors], *, dora: bool) -> dict[str, Any]:
    """What mlx-lm reads; its keys are whole paths, so `num_layers` has no effect."""
    first = next(iter(factors.values()))
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": adapter.dropout,
            "keys": list(factors),
        },
        "model": adapter.base_model,
    }


def uniform(factors: dict[str, Factors]) -> tuple[dict[str, Factors], list[str]]:
    """The same updates at one rank, the highest, and one scale, the most frequent; with notes."""
    notes = []
    rank = max(layer.rank for layer in factors.values())
    scale = Counter(layer.scale for layer in factors.values()).most_common(1)[0][0]
    padded = sum(layer.rank != rank for layer in factors.values())
    folded = sum(layer.scale != scale for layer in factors.values())
    if padded:
        notes.append(f"padded with zeros to rank {rank}: {padded} layers (exact, but larger)")
    if folded:
        notes.append(f"folded into B, for one scale of {scale:g}: {folded} layers")
    if scale == 0 and folded:
        raise InputError("most layers have scale 0, which no other scale can be folded into")
    return {p: layer.padded(rank).at_scale(scale) for p, layer in factors.items()}, notes


def _check_embeddings(factors: Mapping[str, Factors], base: BaseConfig | None) -> None:
    inputs = [path for path, layer in factors.items() if layer.kind is EMBEDDING_INPUT]
    if inputs and (base is None or base.tied):
        hint = "name a base model without tied embeddings with --model"
        raise InputError(f"mlx-lm adapts the output with a tied embedding: {inputs[0]}; {hint}")


register_format(
    Format(
        name="mlx-lm",
        files=(_TENSORS,),
        recognizes=lambda start, config: (
            not start.startswith(b"PK")
            and not {"format", "peft_type"} & config.keys()
            and ("fine_tune_type" in config or "lora_parameters" in config)
        ),
        read=lambda path, alpha: read_mlx_lm(path),
        write=write_mlx_lm,
        usage=Usage(
            "mlx-lm",
            "mlx",
            """\
```console
$ mlx_lm.generate --model {base} --adapter-path {folder} --prompt "Hello"
```

where `{folder}` is a copy of this repository (`hf download {name} --local-dir {folder}`).""",
        ),
    )
)
