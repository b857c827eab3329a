"""PEFT's adapter folders: adapter_model.safetensors (or .bin) and adapter_config.json.

Reference: https://github.com/huggingface/peft/blob/main/src/peft/utils/save_and_load.py and
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.factors import HALVES, Adapter, Product, from_products, paired, products
from graft.adapters.rotary import reordered
from graft.errors import InputError
from graft.pretrained.base_config import BaseModel
from graft.storage.atomic import new_folder
from graft.storage.json_file import read_json
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx

TENSORS, OLD_TENSORS, CONFIG = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
)
PREFIX = "base_model.model."
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}
COPY_END = ".base_layer.weight"
KINDS = ("linear", "embedding", "embedding-input", "embedding-columns", "conv")
# What these say is told by the tensors, or does not change what the adapter computes.
HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type"),
    *("task_type", "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("exclude_modules", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "runtime_config",
)
# Other starts change the base model, which the adapter then needs.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_peft(path: Path) -> Adapter:
    """A folder's file of tensors, with the configuration beside it.

    Raises:
        InputError: a file is missing or damaged, or an option would change the result; all such
            options are named.
    """
    where = path.with_name(CONFIG)
    config = read_json(where)
    _check_options(config, where)
    tensors = {n.removeprefix(PREFIX): array for n, array in read_tensor_file(path).items()}
    pairs, others = paired(tensors, ENDS)
    # PEFT saves adapted embeddings whole as well, though it trains only what is beside them.
    copies = [name for name in others if name.removesuffix(COPY_END) in pairs]
    others = [name for name in others if name not in copies]
    if others or not pairs:
        raise InputError(f"{path} is no LoRA alone: it holds {', '.join(others) or 'nothing'}")
    found = {}
    for name, halves in pairs.items():
        layout = _from_embedding if f"{name}.lora_embedding_A" in tensors else _from_layer
        product = layout(halves, *_alpha(name, config, where))
        if ("m" in halves) != bool(config.get("use_dora")):
            raise InputError(f"{where}: use_dora does not agree with the tensors of {name}")
        found[name] = product
    base, dropout = config.get("base_model_name_or_path"), config.get("lora_dropout") or 0.0
    return from_products(
        _without_tied_twin(found),
        base_model=base if isinstance(base, str) else None,
        dropout=dropout,
        rotary=HALVES,
        notes=tuple(f"{path}: {name} is taken for the base model's own" for name in copies),
    )


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {config.get('peft_type')!r}: Graft reads LORA")
    problems = [
        f"{name} {value!r}"
        for name, value in config.items()
        if value not in (None, False, "none") and value != [] and value != {}
        if name not in HARMLESS
    ]
    start = config.get("init_lora_weights", True)
    if not any(start is known or (start == known and type(known) is str) for known in STARTS):
        problems.append(f"init_lora_weights {start!r}, which changes the base model")
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout {dropout!r}")
    if type(config.get("lora_alpha")) not in (int, float):
        problems.append(f"lora_alpha {config.get('lora_alpha')!r}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        problems.append(f"alpha_pattern {patterns!r}")
    else:
        problems += [f"alpha_pattern {p!r}: {v!r}" for p, v in patterns.items() if _odd(p, v)]
    if problems:
        raise InputError(
            f"{where} asks for what Graft does not do: {'; '.join(problems)}; merge the adapter "
            "with PEFT, or train one without"
        )


def _odd(pattern: str, alpha: Any) -> bool:
    """Whether a pattern of alphas is wrong, or such that matching it might never end."""
    if type(alpha) not in (int, float) or len(pattern) > 500:
        return True
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        return True
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True
    return False


def _alpha(name: str, config: Mapping[str, Any], where: Path) -> tuple[float, bool]:
    """Alpha of a layer as PEFT finds it, and whether the scale is rsLoRA's."""
    patterns = config.get("alpha_pattern") or {}
    matches = (p for p in patterns if re.match(rf"(.*\.)?({p})$", name))
    key = next(matches, None)
    alpha = config["lora_alpha"] if key is None else patterns[key]
    return float(alpha), bool(config.get("use_rslora"))


def _from_layer(halves: Mapping[str, mx.array], alpha: float, rank_stabilized: bool) -> Product:
    """PEFT's A (rank, in) and B (out, rank); a convolution's have a window behind."""
    a, b, magnitude = halves["a"], halves["b"], halves.get("m")
    kind = "linear"
    if a.ndim > 2:
        kind = "conv"
        a = mx.moveaxis(a, 1, -1)
        b = b.reshape(*b.shape[:2])
    if magnitude is not None:
        magnitude = magnitude.flatten()
    return Product(kind, mx.moveaxis(a, 0, -1), b.T, alpha, rank_stabilized, magnitude)


def _from_embedding(halves: Mapping[str, mx.array], alpha: float, rank_stabilized: bool) -> Product:
    """PEFT's A (rank, vocabulary) and B (dims, rank), which act on the input alone."""
    magnitude = halves.get("m")
    if magnitude is not None:
        magnitude = magnitude.flatten()
    kind = "embedding-input" if magnitude is None else "embedding-columns"
    return Product(kind, halves["a"].T, halves["b"].T, alpha, rank_stabilized, magnitude)


def _without_tied_twin(found: dict[str, Product]) -> dict[str, Product]:
    """One adapted embedding in place of the two layers that `write_peft` makes of a tied one."""
    head = found.get("lm_head")
    for path, product in found.items():
        if head is None or product.kind != "embedding-input" or product.scale != head.scale:
            continue
        twins = ((product.a, head.b.T), (product.b, head.a.T))
        if all(mx.array_equal(one, other).item() for one, other in twins):
            rest = {name: other for name, other in found.items() if name != "lm_head"}
            return rest | {path: replace(product, kind="embedding")}
    return found


def write_peft(
    adapter: Adapter, out: Path, *, base: BaseModel | None = None, force: bool = False
) -> list[str]:
    """Write a folder that PEFT loads; returns what was changed to fit, a line each.

    A tied embedding that is adapted becomes two layers, as in PEFT each side has its own update.

    Raises:
        InputError: layers that PEFT's LoRA has no adapter for, something that must be known of the
            base model, or a place that cannot be written.
    """
    if base is not None:
        adapter = reordered(
            replace(adapter, rotary=adapter.rotary or base.rotary), HALVES, base.heads
        )
    elif adapter.rotary not in (None, HALVES):
        raise InputError("to order the rows of q and k, name the base model with --model")
    found = products(adapter, target="PEFT", kinds=KINDS, dora=True)
    found, notes = _untied(found, base)
    dora = [path for path, product in found.items() if product.magnitude is not None]
    if dora and len(dora) < len(found):
        raise InputError(f"PEFT has DoRA for all layers or none; these have it: {', '.join(dora)}")
    stabilized = all(product.rank_stabilized for product in found.values())
    if not stabilized:
        found = {path: product.scaled(product.scale) for path, product in found.items()}
    tensors: dict[str, mx.array] = {}
    for path, product in found.items():
        tensors |= {PREFIX + path + end: array for end, array in _to_peft(product).items()}
    config = _config(adapter, found, dora=bool(dora), stabilized=stabilized)
    with new_folder(out, replace=force) as folder:
        mx.save_safetensors(str(folder / TENSORS), tensors, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def _config(
    adapter: Adapter, found: Mapping[str, Product], *, dora: bool, stabilized: bool
) -> dict[str, Any]:
    rank = Counter(product.rank for product in found.values()).most_common(1)[0][0]
    alpha = Counter(product.alpha for product in found.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": list(found),
        "rank_pattern": {path: p.rank for path, p in found.items() if p.rank != rank},
        "alpha_pattern": {path: _plain(p.alpha) for path, p in found.items() if p.alpha != alpha},
        "use_rslora": stabilized,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _plain(alpha: float) -> float:
    """A whole number without a point, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _to_peft(product: Product) -> dict[str, mx.array]:
    """From the end of a name to the tensor, in PEFT's layout."""
    if product.kind.startswith("embedding"):
        names, halves = (".lora_embedding_A", ".lora_embedding_B"), (product.a.T, product.b.T)
    else:
        a, b = mx.moveaxis(product.a, -1, 0), product.b.T
        if product.kind == "conv":
            a, b = mx.moveaxis(a, -1, 1), b.reshape(*b.shape, *[1] * (a.ndim - 2))
        names, halves = (".lora_A.weight", ".lora_B.weight"), (a, b)
    found = dict(zip(names, map(mx.contiguous, halves), strict=True))
    if product.magnitude is not None:
        shape = (1, -1, *[1] * (product.a.ndim - 2)) if product.kind == "conv" else (-1,)
        found[".lora_magnitude_vector"] = product.magnitude.reshape(shape)
    return found


def _untied(
    found: dict[str, Product], base: BaseModel | None
) -> tuple[dict[str, Product], list[str]]:
    """The same with a tied embedding's update on the output as a layer of its own."""
    path = next((path for path, p in found.items() if p.kind == "embedding"), None)
    if path is None:
        return found, []
    if base is None:
        raise InputError(
            f"{path} is an embedding: name the base model with --model, as PEFT adapts a tied one "
            "on one side only"
        )
    product = found[path]
    if not base.tied:
        return found, []
    if product.magnitude is not None:
        raise InputError(f"PEFT has no DoRA for an embedding that is tied to the output: {path}")
    head = replace(product, kind="linear", a=product.b.T, b=product.a.T)
    note = f"{path} is tied to the output: lm_head was given the same update"
    return found | {"lm_head": head}, [note]
