"""mlx-lm's adapter folders: adapters.safetensors and adapter_config.json.

One rank and one scale for all layers; whole paths as keys, which any subset of layers can be named
by.

Reference: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py
"""

import json
import math
from collections import Counter
from pathlib import Path

from graft.adapters.factors import (
    Adapter,
    Product,
    alpha_for,
    from_products,
    guess_kind,
    paired,
    products,
)
from graft.adapters.layer_config import LayerConfig
from graft.adapters.rotary import reordered
from graft.errors import InputError
from graft.pretrained.base_config import BaseModel
from graft.storage.atomic import new_folder
from graft.storage.json_file import read_json
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
ENDS = {".lora_a": "a", ".lora_b": "b", ".m": "m"}
KINDS = ("linear", "embedding", "embedding-input", "experts")


def read_mlx_lm(path: Path) -> Adapter:
    """A folder's file of tensors, with the configuration beside it.

    Raises:
        InputError: a file is missing or damaged, or it is no LoRA or DoRA.
    """
    where = path.with_name(CONFIG)
    config = read_json(where)
    method = config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise InputError(f"{where}: fine_tune_type {method!r} is no adapter; there are lora, dora")
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, dropout = parameters.get("scale"), parameters.get("dropout", 0.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(f"{where}: lora_parameters has scale {scale!r}; it must be a number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_parameters has dropout {dropout!r}; give 0 to below 1")
    pairs, others = paired(read_tensor_file(path), ENDS)
    lengths = [name for name, found in pairs.items() if ("m" in found) != (method == "dora")]
    if others or lengths or not pairs:
        what = ", ".join(others + [f"{name}.m" for name in lengths]) or "nothing"
        raise InputError(f"{path} is no {method} of mlx-lm: it has, or lacks, {what}")
    model = config.get("model")
    base = model if isinstance(model, str) else None
    return from_products(
        {name: _product(name, found, float(scale)) for name, found in pairs.items()},
        base_model=base,
        dropout=float(dropout),
    )


def _product(path: str, found: dict[str, mx.array], scale: float) -> Product:
    kind = guess_kind(path, LayerConfig(1, 1.0), found["a"])
    product = Product(kind, found["a"], found["b"], 1.0, magnitude=found.get("m"))
    rank = product.rank if product.b.ndim > 1 else 1
    return Product(kind, found["a"], found["b"], alpha_for(scale, rank), magnitude=found.get("m"))


def write_mlx_lm(
    adapter: Adapter, out: Path, *, base: BaseModel | None = None, force: bool = False
) -> list[str]:
    """Write a folder that mlx-lm loads; returns what was changed to fit, a line each.

    Raises:
        InputError: layers that mlx-lm has no adapter for, or a place that cannot be written.
    """
    if base is not None:
        adapter = reordered(adapter, base.rotary, base.heads)
    elif adapter.rotary is not None:
        raise InputError(
            "the rows of q and k depend on the base model that mlx-lm runs: name it with --model"
        )
    found = products(adapter, target="mlx-lm", kinds=KINDS, dora=True)
    _check_embeddings(found, base)
    dora = {path for path, product in found.items() if product.magnitude is not None}
    if dora and len(dora) < len(found):
        raise InputError(
            f"mlx-lm has DoRA for all layers or none; these have it: {', '.join(sorted(dora))}"
        )
    found, notes = uniform(found)
    first = next(iter(found.values()))
    tensors = {
        f"{path}.lora_{half}": getattr(p, half) for path, p in found.items() for half in "ab"
    }
    tensors |= {f"{path}.m": p.magnitude for path, p in found.items() if p.magnitude is not None}
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": adapter.dropout,
            "keys": list(found),
        },
        "model": adapter.base_model,
    }
    with new_folder(out, replace=force) as folder:
        mx.save_safetensors(str(folder / TENSORS), tensors, metadata={"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def uniform(found: dict[str, Product]) -> tuple[dict[str, Product], list[str]]:
    """The same updates at one rank and one scale: the highest, and the most frequent."""
    notes = []
    rank = max(product.rank for product in found.values())
    scale = Counter(product.scale for product in found.values()).most_common(1)[0][0]
    padded = [path for path, product in found.items() if product.rank < rank]
    folded = [path for path, product in found.items() if product.scale != scale]
    if padded:
        notes.append(f"padded with zeros to rank {rank}: {len(padded)} layers (exact, but larger)")
    if folded:
        notes.append(f"folded into B, for one scale of {scale:g}: {len(folded)} layers")
    if scale == 0 and folded:
        raise InputError("most layers have scale 0, which no other can be folded into")
    return {path: p.padded(rank).scaled(scale) for path, p in found.items()}, notes


def _check_embeddings(found: dict[str, Product], base: BaseModel | None) -> None:
    inputs = [path for path, product in found.items() if product.kind == "embedding-input"]
    if inputs and (base is None or base.tied):
        why = "name a base model without tied embeddings with --model"
        raise InputError(f"mlx-lm adapts the output with a tied embedding: {inputs[0]}; {why}")
