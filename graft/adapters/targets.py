"""Which layers of a model to adapt, at what rank: from what a person says to settings.

    python -m graft targets --model M --targets q_proj,*norm* --rank-pattern q_proj=16

prints every layer that can be adapted, and what these options would train, without training. Knows
module paths, kinds and methods; nothing of training.
"""

import argparse
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.adapters.attach import LayerConfig, attach, count_parameters, setting_problems
from graft.adapters.layer_kinds import LINEAR, VECTOR, FusedParts, LayerKind, kind_of
from graft.adapters.methods import METHODS
from graft.cli.command import command
from graft.errors import InputError
from graft.models import is_quantized, linear_dims, weight_shape
from graft.pretrained.folder import find_folder
from graft.pretrained.load import read_model
from graft.pretrained.module_paths import natural_key
from graft.training import options as run_options
from graft.training.options import DEFAULT_ALPHA, Options

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

ALL_LINEAR = "all-linear"

# Words that stand for all layers of a sort within the chosen blocks.
KEYWORDS: dict[str, Callable[["Candidate"], bool]] = {
    ALL_LINEAR: lambda layer: (
        layer.kind.name in ("linear", "experts") or isinstance(layer.module, nn.Linear)
    ),
    "all-norms": lambda layer: layer.kind is VECTOR,
    "all-biases": lambda layer: "bias" in layer.module,
}

# Names that fused projections have in mlx-lm, and the parts in them.
QKV = ("q", "k", "v")
FUSED_NAMES: dict[str, tuple[str, ...]] = {
    "c_attn": QKV,
    "qkv": QKV,
    "qkv_proj": QKV,
    "query_key_value": QKV,
    "wqkv": QKV,
    "Wqkv": QKV,
    "gate_up_proj": ("gate", "up"),
}
# Architectures where the parts recur: for every head, or for every key-value head.
RECURRING = {
    "mlx_lm.models.gpt_neox": "heads",
    "mlx_lm.models.internlm2": "groups",
    "mlx_lm.models.phi3small": "groups",
}
HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
KEY_VALUE_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")

# A feed-forward block's second matrix, whose input (IA)3 scales instead of its output.
FEED_FORWARD_ENDS = (
    *("down_proj", "mlp.c_proj", "fc2", "w2", "linear2", "dense_4h_to_h", "fc_out", "wo"),
    *("mlp.proj", "ffn.down", "feed_forward.w2"),
)


@dataclass(frozen=True)
class Candidate:
    """Something that can be named as a target.

    Attributes:
        path: of the module.
        names: whole paths that it answers to; more than one where a projection has a short name.
        module: the layer.
        kind: of the layer.
        parts: for one part of a fused projection, the division with that part alone enabled.
        inside: whether it lies in the blocks that `num_layers` chose, and not beside them.
    """

    path: str
    names: tuple[str, ...]
    module: nn.Module
    kind: LayerKind
    parts: FusedParts | None
    inside: bool

    def matches(self, target: str) -> bool:
        """Whether a target means this layer."""
        if target in KEYWORDS:
            return self.inside and self.parts is None and KEYWORDS[target](self)
        return any(_names(name, target) for name in self.names)


def plan(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    method: str = "lora",
    num_layers: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, LayerConfig]:
    """How each layer that is to be adapted is adapted, for `graft.adapters.attach.attach`.

    A target is a module's name (`q_proj`), the end of its path (`mlp.up_proj`), a whole path, a
    glob over whole paths (`*.mlp.*`), one of `KEYWORDS`, or one of these with the part of a fused
    projection behind it (`c_attn.q`). Patterns name layers in the same way.

    Args:
        model: any MLX model.
        targets: what to adapt, also as one string with commas; by default what suits the method.
        rank: of layers that no pattern names; vectors have none.
        alpha: of layers that no pattern names.
        method: one of `graft.adapters.methods.METHODS`.
        num_layers: how many of the last transformer blocks, in a model that has such; -1 for all,
            `None` for 16 or all if there are fewer. Layers outside of blocks, such as `lm_head`,
            are adapted if they are named.
        rank_pattern: from target to rank.
        alpha_pattern: from target to alpha.

    Raises:
        InputError: targets or patterns that match nothing, patterns that disagree, ranks that a
            layer cannot have, a method on a layer that does not define it, more blocks than there
            are; all of them named.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: there are {', '.join(METHODS)}")
    targets = METHODS[method].targets if targets is None else targets
    wanted = targets.split(",") if isinstance(targets, str) else targets
    wanted = [target.strip() for target in wanted if target.strip()]
    if not wanted:
        raise InputError(f"--targets {targets!r} names nothing; all-linear names every projection")
    found = candidates(model, num_layers)
    problems = _unmatched_targets(wanted, found, method)
    chosen = _choose(found, wanted)
    ranks, rank_problems = _apply("--rank-pattern", rank_pattern or {}, chosen, found)
    alphas, alpha_problems = _apply("--alpha-pattern", alpha_pattern or {}, chosen, found)
    settings = {
        path: _setting(layer, rank, alpha, method, ranks.get(path), alphas.get(path))
        for path, layer in chosen.items()
    }
    problems += rank_problems + alpha_problems
    problems += setting_problems({path: layer.module for path, layer in chosen.items()}, settings)
    if problems:
        raise InputError("; ".join(problems))
    return settings


def plan_run(model: nn.Module, options: Options) -> dict[str, LayerConfig]:
    """`plan` by the options of a run.

    Raises:
        InputError: as for `plan`, or patterns that cannot be read.
    """
    return plan(
        model,
        options.targets,
        rank=options.rank,
        alpha=DEFAULT_ALPHA if options.alpha is None else options.alpha,
        method=options.method,
        num_layers=options.lora_layers,
        rank_pattern=parse_pattern(options.rank_pattern or "", int, option="--rank-pattern"),
        alpha_pattern=parse_pattern(options.alpha_pattern or "", float, option="--alpha-pattern"),
    )


def read_originals(name: str | None, settings: Mapping[str, LayerConfig]) -> dict[str, mx.array]:
    """The weights before quantization that LoftQ starts from, by module path; none without LoftQ.

    Args:
        name: folder or Hub name of the model before quantization.
        settings: what will be adapted.

    Raises:
        InputError: LoftQ without a name, or a model that is quantized too or lacks the layers.
    """
    paths = [path for path, s in settings.items() if METHODS[s.method].start_from_original]
    if not paths:
        return {}
    if name is None:
        raise InputError("--method loftq needs --original-model, the model before quantization")
    modules = dict(read_model(find_folder(name))[0].named_modules())
    bad = [path for path in paths if path not in modules or is_quantized(modules[path])]
    if bad:
        raise InputError(f"--original-model {name} has no whole weight of {', '.join(bad)}")
    return {path: modules[path].weight for path in paths}


def choose_layers(
    model: nn.Module, targets: Sequence[str] = (ALL_LINEAR,), *, num_layers: int | None = None
) -> list[str]:
    """Paths of the modules that `targets` name within the last `num_layers` transformer blocks.

    Arguments and errors as for `plan`.
    """
    return list(plan(model, targets, rank=1, num_layers=num_layers))


def candidates(model: nn.Module, num_layers: int | None = None) -> list[Candidate]:
    """Everything in a model that can be adapted, in the model's order.

    Raises:
        InputError: more blocks asked for than there are, or of a model that has none.
    """
    modules = dict(model.named_modules())
    blocks, chosen = _blocks(model, num_layers)
    outside = set(blocks) - set(chosen)
    found = []
    for path in sorted(modules, key=natural_key):
        kind = kind_of(modules[path])
        if kind is None or not path or _within(path, outside):
            continue
        inside = not blocks or _within(path, chosen)
        parent = modules.get(path.rpartition(".")[0])
        layer = Candidate(path, _all_names(path, parent), modules[path], kind, None, inside)
        found += [layer, *_part_candidates(layer, parent)]
    return found


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks, in order.

    Raises:
        InputError: the model has no list of blocks.
    """
    blocks = [b for b in getattr(model, "layers", None) or () if isinstance(b, nn.Module)]
    if not blocks:
        raise InputError(f"{type(model).__name__} has no list of transformer blocks to adapt")
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in blocks]


def find_parts(module: nn.Module, name: str, parent: nn.Module | None) -> FusedParts | None:
    """The parts of a linear layer that is a fused projection by its name, or `None`.

    Args:
        module: the layer.
        name: the last part of its path.
        parent: the module around it, whose numbers of heads tell the sizes.
    """
    names = FUSED_NAMES.get(name)
    if names is None or kind_of(module) is not LINEAR:
        return None
    outputs = linear_dims(module)[1]
    heads = _attribute(parent, HEADS) or 1
    groups = _attribute(parent, KEY_VALUE_HEADS) or heads
    shares = (heads // groups, 1, 1) if names is QKV else (1,) * len(names)
    unit, rest = divmod(outputs, sum(shares))
    recurring = RECURRING.get(type(parent).__module__)
    repeats = {"heads": heads, "groups": groups}.get(recurring or "", 1)
    if rest or unit % repeats or (names is QKV and heads % groups):
        return None
    return FusedParts(names, tuple(unit // repeats * share for share in shares), (), repeats)


def parse_pattern(text: str, number: type, *, option: str) -> dict[str, Any]:
    """The mapping that `q_proj=16,*norm*=1` stands for.

    Raises:
        InputError: pieces that are not NAME=NUMBER, all of them named.
    """
    result, problems = {}, []
    for piece in filter(None, text.split(",")):
        name, _, value = piece.rpartition("=")
        try:
            result[name.strip()] = number(value)
        except ValueError:
            name = ""
        if not name:
            problems.append(f"{option}: {piece!r} is not NAME=NUMBER, such as q_proj=16")
    if problems:
        raise InputError("; ".join(problems))
    return result


def _blocks(model: nn.Module, num_layers: int | None) -> tuple[list[str], list[str]]:
    """Paths of all blocks, and of those that are adapted."""
    try:
        blocks = block_paths(model)
    except InputError:
        if num_layers in (None, -1):
            return [], []
        raise
    count = min(16, len(blocks)) if num_layers is None else num_layers
    if count > len(blocks) or count < -1 or count == 0:
        raise InputError(
            f"--lora-layers {num_layers}: the model has {len(blocks)} layers; "
            f"give 1 to {len(blocks)}, or -1 for all"
        )
    return blocks, blocks if count == -1 else blocks[-count:]


def _within(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + ".") for folder in folders)


def _all_names(path: str, parent: nn.Module | None) -> tuple[str, ...]:
    """A path, and the short name that attention's projections have (`query` for `query_proj`)."""
    short = path.removesuffix("_proj")
    is_short = isinstance(parent, nn.MultiHeadAttention) and short != path
    return (path, short) if is_short else (path,)


def _part_candidates(layer: Candidate, parent: nn.Module | None) -> list[Candidate]:
    parts = find_parts(layer.module, layer.path.rpartition(".")[2], parent)
    if parts is None:
        return []
    return [
        replace(layer, names=(f"{layer.path}.{name}",), parts=replace(parts, enabled=(name,)))
        for name in parts.names
    ]


def _names(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target) or fnmatch.fnmatchcase(path, target)


def _choose(found: Sequence[Candidate], targets: Sequence[str]) -> dict[str, Candidate]:
    """The candidates that a target means, by path; parts of one projection come together."""
    chosen: dict[str, Candidate] = {}
    for layer in found:
        if not any(layer.matches(target) for target in targets):
            continue
        present = chosen.get(layer.path)
        if present is None:
            chosen[layer.path] = layer
        elif present.parts is not None and layer.parts is not None:
            enabled = present.parts.enabled + layer.parts.enabled
            names = present.names + layer.names
            parts = replace(present.parts, enabled=enabled)
            chosen[layer.path] = replace(present, names=names, parts=parts)
    return chosen


def _unmatched_targets(
    targets: Sequence[str], found: Sequence[Candidate], method: str
) -> list[str]:
    unmatched = [t for t in targets if not any(layer.matches(t) for layer in found)]
    if not unmatched:
        return []
    kinds = METHODS[method].kinds
    names = {
        layer.names[0].rpartition(".")[2]
        for layer in found
        if layer.parts is None and layer.kind.name in kinds
    }
    return [
        f"--targets {','.join(unmatched)} matches no layer; there are {', '.join(sorted(names))} "
        f"(or {', '.join(KEYWORDS)}, a path, a glob)"
    ]


def _apply(
    option: str,
    pattern: Mapping[str, Any],
    chosen: Mapping[str, Candidate],
    found: Sequence[Candidate],
) -> tuple[dict[str, Any], list[str]]:
    """What a pattern says for each path, and what is wrong with it."""
    said: dict[str, dict[str, Any]] = {
        path: {name: value for name, value in pattern.items() if _pattern_matches(layer, name)}
        for path, layer in chosen.items()
    }
    problems = [
        _idle(f"{option} {name}={value}", name, found)
        for name, value in pattern.items()
        if not any(name in values for values in said.values())
    ]
    disagreements: dict[str, list[str]] = {}
    for path, values in said.items():
        if len(set(values.values())) > 1:
            both = " and ".join(f"{name}={value}" for name, value in values.items())
            disagreements.setdefault(both, []).append(path)
    problems += [
        f"{option}: {both} disagree on {', '.join(paths)}" for both, paths in disagreements.items()
    ]
    return {path: next(iter(values.values())) for path, values in said.items() if values}, problems


def _idle(piece: str, name: str, found: Sequence[Candidate]) -> str:
    """What is wrong with a piece of a pattern that reaches no chosen layer."""
    others = dict.fromkeys(layer.path for layer in found if _pattern_matches(layer, name))
    if others:
        return f"{piece} names {', '.join(others)}, not chosen: add it to --targets"
    names = sorted({layer.names[0].rpartition(".")[2] for layer in found if layer.parts is None})
    return f"{piece} matches no layer; there are {', '.join(names)}"


def _pattern_matches(layer: Candidate, name: str) -> bool:
    return layer.matches(name) or _names(layer.path, name)


def _setting(
    layer: Candidate,
    rank: int,
    alpha: float,
    method: str,
    own_rank: int | None,
    own_alpha: float | None,
) -> LayerConfig:
    """A layer's setting: what patterns say, else what is said for all, else 1 without a rank."""
    on_ends = METHODS[method].on_feed_forward_ends
    if on_ends and any(_names(layer.path, end) for end in FEED_FORWARD_ENDS):
        method = on_ends
    without_rank = layer.kind is VECTOR or not METHODS[method].ranked
    rank, alpha = (1, 1.0) if without_rank else (rank, alpha)
    rank = rank if own_rank is None else own_rank
    if METHODS[method].alpha_is_rank:
        alpha = float(rank)
    alpha = alpha if own_alpha is None else own_alpha
    return LayerConfig(rank, alpha, method, parts=layer.parts)


def _attribute(module: nn.Module | None, names: Sequence[str]) -> int | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


FIELDS = (
    *("model", "lora_layers", "method", "targets"),
    *("rank", "alpha", "rank_pattern", "alpha_pattern"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options of `lora.py` that tell what is adapted."""
    text = "Show which layers of a model can be adapted, and what would be trained at what rank."
    parser = run_options.build_parser(text, FIELDS)
    methods = (f"  {name:<12} {method.text}" for name, method in METHODS.items())
    parser.epilog = "\n".join(["methods:", *methods])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of every layer that can be adapted, and the totals.

    Raises:
        InputError: as for `plan`.
    """
    options = run_options.from_mapping(run_options.parse(build_parser(), argv))
    model, _ = read_model(find_folder(options.model))
    settings = plan_run(model, options)
    found = candidates(model, -1)
    layers = [layer for layer in found if layer.parts is None]
    parts = {layer.path: layer.parts.names for layer in found if layer.parts is not None}
    total = count_parameters(model)[1]
    attach(model, settings, blank=True)
    trained = {
        path: sum(array.size for array in dict(tree_flatten(layer.trainable_parameters())).values())
        for path, layer in model.named_modules()
        if path in settings
    }
    rows = [
        _row(layer, parts.get(layer.path, ()), settings.get(layer.path), trained.get(layer.path, 0))
        for layer in layers
    ]
    print(_table(("layer", "kind", "shape", "trained", "rank", "alpha", "parameters"), rows))
    count = sum(trained.values())
    print(
        f"\n{len(settings)} of {len(layers)} layers adapted: {count:,} parameters trained beside "
        f"{total:,} of the model ({count / total:.2%})"
    )
    return 0


def _row(
    layer: Candidate, parts: Sequence[str], setting: LayerConfig | None, trained: int
) -> tuple[str, ...]:
    """A line of the table: what the layer is, with its parts, and how it is adapted."""
    kind = layer.kind.name + (f" ({', '.join(parts)})" if parts else "")
    bits = f", {layer.module.bits} bits" if is_quantized(layer.module) else ""
    shape = "x".join(map(str, weight_shape(layer.module))) + bits
    if setting is None:
        return layer.path, kind, shape, "-", "", "", ""
    enabled = f" {'+'.join(setting.parts.enabled)}" if setting.parts else ""
    rank = str(setting.rank) if layer.kind is not VECTOR and METHODS[setting.method].ranked else "-"
    how = setting.method + enabled
    return layer.path, kind, shape, how, rank, f"{setting.alpha:g}", f"{trained:,}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest entry; numbers stand to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = ("rank", "alpha", "parameters")
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
