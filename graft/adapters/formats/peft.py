"""PEFT's adapter folders: adapter_model.safetensors (or .bin) and adapter_config.json.

Reference: https://github.com/huggingface/peft/blob/main/src/peft/utils/save_and_load.py and
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, is_dropout, reordered
from graft.adapters.factors import Factors, factors_of, from_factors, paired
from graft.adapters.formats import RECORD_NAME, Format, Usage, register_format
from graft.adapters.layer_kinds import (
    CONV,
    EMBEDDING,
    EMBEDDING_COLUMNS,
    EMBEDDING_INPUT,
    EXPERTS,
    LINEAR,
)
from graft.errors import InputError
from graft.pretrained.architectures import HALVES
from graft.pretrained.base_config import BaseConfig
from graft.pretrained.module_paths import collapsed
from graft.pretrained.transformers_names import (
    depends_on_architecture,
    is_lost_in_peft,
    layer_in_transformers,
    layers_are_known,
)
from graft.storage.atomic import new_folder
from graft.storage.json_file import read_json_file
from graft.storage.tensor_file import read_tensor_file

import mlx.core as mx

_TENSORS, _OLD_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}
_COPY_SUFFIX = ".base_layer.weight"
# The projections of experts in Mixtral and its kin, by the names of transformers 4.
_NUMBERED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_KINDS = (LINEAR, EMBEDDING, EMBEDDING_INPUT, EMBEDDING_COLUMNS, CONV)
# Options that the tensors make redundant, or that do not change what the adapter computes.
_IGNORED_OPTIONS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type"),
    *("task_type", "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("exclude_modules", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "runtime_config",
)
# Values of init_lora_weights that leave the base model as it is.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# ---- reading ---------------------------------------------------------------------------------


def read_peft(path: Path) -> Adapter:
    """A folder's file of tensors, with the configuration beside it.

    Raises:
        InputError: a file is missing or damaged, or an option would change the result; all such
            options are named.
    """
    record = path.with_name(RECORD_NAME)
    config = read_json_file(record)
    _check_options(config, record)
    tensors = {_plain_name(name): array for name, array in read_tensor_file(path).items()}
    pairs, unknown = paired(tensors, _SUFFIXES)
    # PEFT saves the whole weight of adapted embeddings as well, though it does not train it.
    copies = [name for name in unknown if name.removesuffix(_COPY_SUFFIX) in pairs]
    unknown = [name for name in unknown if name not in copies]
    if unknown or not pairs:
        raise InputError(f"{path} is not LoRA alone: it holds {', '.join(unknown) or 'nothing'}")
    factors = {}
    for name, halves in pairs.items():
        layout = _from_embedding if f"{name}.lora_embedding_A" in tensors else _from_layer
        factors[name] = layout(halves, _alpha(name, config), bool(config.get("use_rslora")))
        if ("m" in halves) != bool(config.get("use_dora")):
            raise InputError(f"{record}: use_dora does not agree with the tensors of {name}")
    base, dropout = config.get("base_model_name_or_path"), config.get("lora_dropout") or 0.0
    return from_factors(
        _with_stacked_experts(_without_tied_twin(factors)),
        base_model=base if isinstance(base, str) else None,
        dropout=dropout,
        rotary=HALVES,
        notes=tuple(f"{path}: {name} is taken to be the base model's own" for name in copies),
    )


def _plain_name(name: str) -> str:
    """A tensor's name without what PyTorch adds to compiled models and PEFT to named adapters."""
    name = name.replace("_orig_mod.", "").removeprefix(_PREFIX)
    return re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.weight$|$)", r"\1", name)


def _with_stacked_experts(factors: dict[str, Factors]) -> dict[str, Factors]:
    """One layer in place of those of single experts, which transformers 4 has.

    Raises:
        InputError: experts that are not adapted alike.
    """
    stacks: dict[str, dict[int, Factors]] = {}
    for path, layer in factors.items():
        if found := re.fullmatch(r"(.+)\.experts\.(\d+)\.([a-z]+_proj|w[123])", path):
            before, number, name = found.groups()
            stack = f"{before}.switch_mlp.{_NUMBERED.get(name, name)}"
            stacks.setdefault(stack, {})[int(number)] = layer
    if not stacks:
        return factors
    rest = {p: f for p, f in factors.items() if not re.search(r"\.experts\.\d+\.", p)}
    for path, experts in stacks.items():
        layers = [experts[number] for number in sorted(experts)]
        kinds = {(f.kind, f.scale, f.a.shape, f.b.shape, f.magnitude is None) for f in layers}
        if sorted(experts) != list(range(len(experts))) or len(kinds) > 1:
            raise InputError(f"the experts of {path} are not all adapted, or not alike")
        first = layers[0]
        if first.kind is not LINEAR or first.magnitude is not None:
            raise InputError(f"Graft has only LoRA for the experts of {path}")
        a, b = (mx.stack([half.T for half in halves]) for halves in _halves(layers))
        rest[path] = replace(first.at_scale(first.scale), kind=EXPERTS, a=a, b=b)
    return rest


def _halves(layers: Sequence[Factors]) -> tuple[list[mx.array], list[mx.array]]:
    return [layer.a for layer in layers], [layer.b for layer in layers]


def _check_options(config: Mapping[str, Any], record: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{record}: peft_type {config.get('peft_type')!r}: Graft reads LORA")
    problems = [
        f"{name} {value!r}"
        for name, value in config.items()
        if value not in (None, False, "none") and value != [] and value != {}
        if name not in _IGNORED_OPTIONS
    ]
    start = config.get("init_lora_weights", True)
    if not any(start is s or (start == s and type(s) is str) for s in _HARMLESS_STARTS):
        problems.append(f"init_lora_weights {start!r}, which changes the base model")
    dropout = config.get("lora_dropout") or 0.0
    if not is_dropout(dropout):
        problems.append(f"lora_dropout {dropout!r}")
    if type(config.get("lora_alpha")) not in (int, float):
        problems.append(f"lora_alpha {config.get('lora_alpha')!r}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        problems.append(f"alpha_pattern {patterns!r}")
    else:
        problems += [f"alpha_pattern {p!r}: {v!r}" for p, v in patterns.items() if _refuses(p, v)]
    if problems:
        raise InputError(
            f"{record} asks for what Graft does not do: {'; '.join(problems)}; merge the adapter "
            "with PEFT, or train one without"
        )


def _refuses(pattern: str, alpha: Any) -> bool:
    """Whether a pattern of alphas is invalid, or could take forever to match."""
    if type(alpha) not in (int, float) or len(pattern) > 500:
        return True
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        return True
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True
    return False


def _alpha(name: str, config: Mapping[str, Any]) -> float:
    """Alpha of a layer as PEFT finds it."""
    patterns = config.get("alpha_pattern") or {}
    key = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    return float(config["lora_alpha"] if key is None else patterns[key])


def _from_layer(halves: Mapping[str, mx.array], alpha: float, rank_stabilized: bool) -> Factors:
    """PEFT's A (rank, inputs, *window) and B (outputs, rank, *ones); linear layers: no window."""
    a, b, magnitude = halves["a"], halves["b"], halves.get("m")
    kind = LINEAR
    if a.ndim > 2:
        kind, a, b = CONV, mx.moveaxis(a, 1, -1), b.reshape(*b.shape[:2])
    if magnitude is not None:
        magnitude = magnitude.flatten()
    return Factors(kind, mx.moveaxis(a, 0, -1), b.T, alpha, rank_stabilized, magnitude)


def _from_embedding(halves: Mapping[str, mx.array], alpha: float, rank_stabilized: bool) -> Factors:
    """PEFT's A (rank, vocabulary) and B (dims, rank), which act on the input alone."""
    magnitude = halves.get("m")
    if magnitude is not None:
        magnitude = magnitude.flatten()
    kind = EMBEDDING_INPUT if magnitude is None else EMBEDDING_COLUMNS
    return Factors(kind, halves["a"].T, halves["b"].T, alpha, rank_stabilized, magnitude)


def _without_tied_twin(factors: dict[str, Factors]) -> dict[str, Factors]:
    """One adapted embedding in place of the two layers that `write_peft` makes of a tied one."""
    head = factors.get("lm_head")
    for path, layer in factors.items():
        if head is None or layer.kind is not EMBEDDING_INPUT or layer.scale != head.scale:
            continue
        pairs = ((layer.a, head.b.T), (layer.b, head.a.T))
        if all(mx.array_equal(mine, heads).item() for mine, heads in pairs):
            rest = {name: other for name, other in factors.items() if name != "lm_head"}
            return rest | {path: replace(layer, kind=EMBEDDING)}
    return factors


# ---- writing ---------------------------------------------------------------------------------


def write_peft(
    adapter: Adapter, out: Path, *, base: BaseConfig | None = None, force: bool = False
) -> list[str]:
    """Write a folder that PEFT loads; returns what was changed to fit, a line each.

    A tied embedding that is adapted becomes two layers, since PEFT adapts each side by itself.

    Raises:
        InputError: layers that PEFT's LoRA has no adapter for, a fact about the base model that is
            needed and not known, or a path that cannot be written.
    """
    if base is not None:
        adapter = reordered(
            replace(adapter, rotary=adapter.rotary or base.rotary), HALVES, base.heads
        )
    elif adapter.rotary not in (None, HALVES):
        raise InputError("to order the rows of q and k, name the base model with --model")
    factors = factors_of(adapter, holder="PEFT", kinds=_KINDS, dora=True)
    factors, notes = _untied(factors, base)
    factors, unknown = _under_their_names(factors, base)
    notes += unknown
    dora = [path for path, layer in factors.items() if layer.magnitude is not None]
    if dora and len(dora) < len(factors):
        raise InputError(
            f"PEFT has DoRA for all layers or none; these layers have it: {', '.join(dora)}"
        )
    stabilized = all(layer.rank_stabilized for layer in factors.values())
    if not stabilized:
        factors = {path: layer.at_scale(layer.scale) for path, layer in factors.items()}
    tensors: dict[str, mx.array] = {}
    for path, layer in factors.items():
        tensors |= {_PREFIX + path + suffix: array for suffix, array in _to_peft(layer).items()}
    config = _config(adapter, factors, dora=bool(dora), stabilized=stabilized)
    with new_folder(out, replace=force) as folder:
        mx.save_safetensors(str(folder / _TENSORS), tensors, metadata={"format": "pt"})
        (folder / RECORD_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def _config(
    adapter: Adapter, factors: Mapping[str, Factors], *, dora: bool, stabilized: bool
) -> dict[str, Any]:
    layers = factors.values()
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole_if_possible(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": list(factors),
        "rank_pattern": {path: f.rank for path, f in factors.items() if f.rank != rank},
        "alpha_pattern": {
            path: _whole_if_possible(f.alpha) for path, f in factors.items() if f.alpha != alpha
        },
        "use_rslora": stabilized,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _whole_if_possible(alpha: float) -> float:
    """A whole number without a decimal point, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _to_peft(factors: Factors) -> dict[str, mx.array]:
    """From the end of a name to the tensor, in PEFT's layout; see `_from_layer`."""
    ones = [1] * (factors.a.ndim - 2)
    if factors.kind.takes_ids:
        suffixes = (".lora_embedding_A", ".lora_embedding_B")
        halves = (factors.a.T, factors.b.T)
    else:
        suffixes = (".lora_A.weight", ".lora_B.weight")
        a = mx.moveaxis(mx.moveaxis(factors.a, -1, 0), -1, 1)
        halves = (a, factors.b.T.reshape(*factors.b.T.shape, *ones))
    tensors = dict(zip(suffixes, map(mx.contiguous, halves), strict=True))
    if factors.magnitude is not None:
        shape = (1, -1, *ones) if ones else (-1,)
        tensors[".lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    return tensors


def _under_their_names(
    factors: dict[str, Factors], base: BaseConfig | None
) -> tuple[dict[str, Factors], list[str]]:
    """The same under transformers' paths; with a note if those are not known."""
    if base is None:
        if unclear := [path for path in factors if depends_on_architecture(path)]:
            raise InputError(
                f"transformers' name of {unclear[0]} depends on the base model: "
                "name it with --model"
            )
        return factors, []
    if not layers_are_known(base.architecture):
        return factors, [
            f"the layers keep mlx-lm's names: transformers' for {base.architecture} are not known"
        ]
    if lost := [path for path in factors if is_lost_in_peft(path, base.architecture)]:
        raise InputError(
            f"PEFT would not apply adapters to these layers of {base.architecture}, as they are no "
            f"linear layers in transformers or PEFT takes their names for those of experts: "
            f"{', '.join(collapsed(lost))}"
        )
    return {layer_in_transformers(p, base.architecture): f for p, f in factors.items()}, []


def _untied(
    factors: dict[str, Factors], base: BaseConfig | None
) -> tuple[dict[str, Factors], list[str]]:
    """The same, with the update of a tied embedding on the output as a layer of its own."""
    path = next((path for path, layer in factors.items() if layer.kind is EMBEDDING), None)
    if path is None:
        return factors, []
    if base is None:
        raise InputError(
            f"{path} is an embedding: name the base model with --model, as PEFT adapts a tied one "
            "on one side only"
        )
    layer = factors[path]
    if not base.tied:
        return factors, []
    if layer.magnitude is not None:
        raise InputError(f"PEFT has no DoRA for an embedding that is tied to the output: {path}")
    head = replace(layer, kind=LINEAR, a=layer.b.T, b=layer.a.T)
    note = f"{path} is tied to the output: lm_head was given the same update"
    return factors | {"lm_head": head}, [note]


register_format(
    Format(
        name="peft",
        files=(_TENSORS, _OLD_TENSORS),
        recognizes=lambda start, config: "peft_type" in config and "format" not in config,
        read=lambda path, alpha: read_peft(path),
        write=write_peft,
        usage=Usage(
            "PEFT",
            "peft",
            """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
```""",
        ),
    )
)
