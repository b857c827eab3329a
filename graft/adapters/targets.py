"""Chooses the layers of a model to adapt, and their rank and alpha, from names and patterns.

A target is a module's name (`q_proj`), the end of its path (`mlp.up_proj`), a whole path, a glob
over one of these (`mlp.*`), a regular expression over whole paths (`re:.*[qv]_proj`), a keyword
such as `all-linear`, or a name followed by the part of a fused projection (`c_attn.q`). One that
begins with `!` leaves layers out. Knows module paths, kinds and methods; nothing of training.
"""

import fnmatch
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.adapters.fused_projections import find_fused_parts
from graft.adapters.layer_config import LayerConfig, config_problems, largest_rank
from graft.adapters.layer_kinds import EXPERTS, LINEAR, VECTOR, FusedParts, LayerKind, kind_of
from graft.adapters.methods import METHODS
from graft.console import note
from graft.errors import InputError
from graft.pretrained.architectures import FEED_FORWARD_OUTPUTS, REWRITTEN_LAYERS
from graft.pretrained.module_paths import collapsed, natural_key

import mlx.core as mx
import mlx.nn as nn

ALL_LINEAR = "all-linear"
# What begins a target that leaves layers out, and one that is a regular expression.
_EXCLUDES, _EXPRESSION = "!", "re:"
# How many of the last transformer blocks are adapted by default.
DEFAULT_BLOCKS = 16

# Targets that name all layers of a sort within the chosen blocks.
KEYWORDS: dict[str, Callable[["Candidate"], bool]] = {
    ALL_LINEAR: lambda layer: (
        layer.kind in (LINEAR, EXPERTS) or isinstance(layer.module, nn.Linear)
    ),
    "all-norms": lambda layer: layer.kind == VECTOR,
    "all-biases": lambda layer: "bias" in layer.module,
}


@dataclass(frozen=True)
class Candidate:
    """A layer, or a part of a fused projection, that a target can name.

    Attributes:
        path: path of the module.
        names: full names that targets are compared with; more than one if a projection has a short
            name.
        module: the layer.
        kind: kind of the layer.
        parts: for a part of a fused projection, all parts with this one enabled.
        inside: whether it is in the blocks that `num_layers` chooses; false outside of blocks.
    """

    path: str
    names: tuple[str, ...]
    module: nn.Module
    kind: LayerKind
    parts: FusedParts | None
    inside: bool

    def matches(self, target: str) -> bool:
        """Whether a target names this layer."""
        if target in KEYWORDS:
            return self.inside and self.parts is None and KEYWORDS[target](self)
        return any(_is_named(name, target) for name in self.names)


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
    """Choose the layers to adapt, and how, for `graft.adapters.attach.attach`.

    A target is a module's name (`q_proj`), the end of its path (`mlp.up_proj`), a whole path, a
    glob over one of these (`mlp.*`), a regular expression over whole paths (`re:.*[qv]_proj`), one
    of `KEYWORDS`, or a name followed by the part of a fused projection (`c_attn.q`). One that
    begins with `!` leaves layers out. Patterns name layers in the same way. Modules that a glob
    names and that have parameters but no weight are not adapted, and reported.

    Args:
        model: any MLX model.
        targets: the layers to adapt, as a list or separated by commas; by default those that suit
            the method.
        rank: rank of layers that no pattern names; vectors have none.
        alpha: alpha of layers that no pattern names.
        method: one of `graft.adapters.methods.METHODS`.
        num_layers: adapt the last N transformer blocks, if the model has any; -1 adapts all, `None`
            the last 16. Layers outside of the blocks, such as `lm_head`, are adapted if a target
            other than a keyword names them.
        rank_pattern: from target to rank.
        alpha_pattern: from target to alpha.

    Returns:
        The configuration of each layer to adapt, by module path.

    Raises:
        InputError: targets or patterns that match nothing, patterns that disagree, ranks that a
            layer cannot have, a method on a layer that it is not defined on, more blocks than there
            are; all of them named.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: there are {', '.join(sorted(METHODS))}")
    wanted = _target_list(METHODS[method].targets if targets is None else targets)
    layers = candidates(model, num_layers)
    problems = _target_problems(wanted, layers, model, method)
    _report_passed_over(model, wanted)
    chosen = _choose(layers, wanted)
    ranks, rank_problems = _match_pattern("--rank-pattern", rank_pattern or {}, chosen, layers)
    alphas, alpha_problems = _match_pattern("--alpha-pattern", alpha_pattern or {}, chosen, layers)
    configs = {
        path: _config(layer, method, ranks.get(path), alphas.get(path), defaults=(rank, alpha))
        for path, layer in chosen.items()
    }
    configs = _without_narrow(chosen, configs, wanted, ranks)
    problems += rank_problems + alpha_problems
    problems += config_problems({path: layer.module for path, layer in chosen.items()}, configs)
    if problems:
        raise InputError("; ".join(problems))
    return configs


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
        InputError: the model has fewer blocks than `num_layers`, or none.
    """
    modules = dict(model.named_modules())
    blocks, chosen = _blocks(model, num_layers)
    outside = set(blocks) - set(chosen)
    layers = []
    for path in sorted(modules, key=natural_key):
        kind = kind_of(modules[path])
        rewritten = path.rpartition(".")[2] in REWRITTEN_LAYERS
        if kind is None or not path or rewritten or _is_within(path, outside):
            continue
        inside = not blocks or _is_within(path, chosen)
        parent = modules.get(path.rpartition(".")[0])
        layer = Candidate(path, _full_names(path, parent), modules[path], kind, None, inside)
        layers += [layer, *_part_candidates(layer, parent)]
    return layers


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


def parse_pattern(text: str, number: type, *, option: str) -> dict[str, Any]:
    """Parse a pattern such as `q_proj=16,*norm*=1` into a mapping from target to number.

    Raises:
        InputError: pieces that are not NAME=NUMBER; all of them named.
    """
    numbers, problems = {}, []
    for piece in filter(None, text.split(",")):
        name, _, value = piece.rpartition("=")
        try:
            numbers[name.strip()] = number(value)
        except ValueError:
            name = ""
        if not name:
            problems.append(f"{option}: {piece!r} is not NAME=NUMBER, such as q_proj=16")
    if problems:
        raise InputError("; ".join(problems))
    return numbers


def _without_narrow(
    chosen: Mapping[str, Candidate],
    configs: Mapping[str, LayerConfig],
    targets: Sequence[str],
    with_own_rank: Container[str],
) -> dict[str, LayerConfig]:
    """The configurations without layers that only a keyword names and that are below the rank.

    Such layers have few outputs, as the gate of a shared expert has one. Those left out are
    reported; if all of them are too narrow, none is left out.
    """
    named = [target for target in targets if target not in KEYWORDS]
    narrow = [
        path
        for path, config in configs.items()
        if config.rank > largest_rank(chosen[path].module, config)
        and path not in with_own_rank
        and not any(chosen[path].matches(target) for target in named)
    ]
    if not narrow or len(narrow) == len(configs):
        return dict(configs)
    ranks = sorted({configs[path].rank for path in narrow})
    note(
        f"rank {', '.join(map(str, ranks))} is more than these layers can have, so they are not "
        f"adapted: {', '.join(collapsed(narrow))}"
    )
    return {path: config for path, config in configs.items() if path not in narrow}


def _target_list(targets: str | Sequence[str]) -> list[str]:
    names = targets.split(",") if isinstance(targets, str) else targets
    wanted = [name.strip() for name in names if name.strip()]
    if not any(not name.startswith(_EXCLUDES) for name in wanted):
        raise InputError(f"--targets {targets!r} names nothing; all-linear names every projection")
    for name in wanted:
        expression = name.removeprefix(_EXCLUDES)
        if expression.startswith(_EXPRESSION):
            try:
                re.compile(expression.removeprefix(_EXPRESSION))
            except (re.error, RecursionError, OverflowError) as error:
                raise InputError(f"--targets {name}: not a regular expression: {error}") from error
    return wanted


def _blocks(model: nn.Module, num_layers: int | None) -> tuple[list[str], list[str]]:
    """Paths of all blocks, and of those that are adapted."""
    try:
        blocks = block_paths(model)
    except InputError:
        if num_layers in (None, -1):
            return [], []
        raise
    count = min(DEFAULT_BLOCKS, len(blocks)) if num_layers is None else num_layers
    if count > len(blocks) or count < -1 or count == 0:
        raise InputError(
            f"--lora-layers {num_layers}: the model has {len(blocks)} layers; "
            f"give 1 to {len(blocks)}, or -1 for all"
        )
    return blocks, blocks if count == -1 else blocks[-count:]


def _is_within(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + ".") for folder in folders)


def _full_names(path: str, parent: nn.Module | None) -> tuple[str, ...]:
    """A path, and the short name of attention's projections (`query` for `query_proj`)."""
    short = path.removesuffix("_proj")
    is_short = isinstance(parent, nn.MultiHeadAttention) and short != path
    return (path, short) if is_short else (path,)


def _last_names(layers: Iterable[Candidate], kinds: Container[str] | None = None) -> str:
    """The last part of the layers' names, for an error message."""
    names = {
        layer.names[0].rpartition(".")[2]
        for layer in layers
        if layer.parts is None and (kinds is None or layer.kind.name in kinds)
    }
    return ", ".join(sorted(names))


def _part_candidates(layer: Candidate, parent: nn.Module | None) -> list[Candidate]:
    parts = find_fused_parts(layer.module, layer.path.rpartition(".")[2], parent)
    if parts is None:
        return []
    return [
        replace(layer, names=(f"{layer.path}.{name}",), parts=replace(parts, enabled=(name,)))
        for name in parts.names
    ]


def _is_named(path: str, target: str) -> bool:
    if target.startswith(_EXPRESSION):
        return re.fullmatch(target.removeprefix(_EXPRESSION), path) is not None
    return any(fnmatch.fnmatchcase(path, glob) for glob in (target, f"*.{target}"))


def _choose(layers: Iterable[Candidate], targets: Sequence[str]) -> dict[str, Candidate]:
    """The candidates that the targets name, by path; parts of one projection become one entry."""
    chosen: dict[str, Candidate] = {}
    left_out = [target.removeprefix(_EXCLUDES) for target in targets if target[0] == _EXCLUDES]
    targets = [target for target in targets if target[0] != _EXCLUDES]
    for layer in layers:
        if not any(layer.matches(target) for target in targets):
            continue
        if any(_pattern_matches(layer, target) for target in left_out):
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


def _target_problems(
    targets: Sequence[str], layers: Sequence[Candidate], model: nn.Module, method: str
) -> list[str]:
    names = {target: target.removeprefix(_EXCLUDES) for target in targets}
    unmatched = [t for t, n in names.items() if not any(layer.matches(n) for layer in layers)]
    problems = []
    if "all-biases" in targets and not METHODS[method].needs_bias:
        problems.append(f"--targets all-biases: {method} does not train biases; use --method bias")
    for target in list(unmatched):
        inside = f"{names[target]}.*"
        reasons = [f"{text} has no weight" for text in _passed_over(model, target, named=True)]
        if any(layer.matches(inside) for layer in layers):
            reasons = [f"it is no layer but contains some: {target}.* names them"]
        if reasons:
            problems.append(f"--targets {target}: {'; '.join(reasons)}")
            unmatched.remove(target)
    if unmatched:
        problems.append(
            f"--targets {','.join(unmatched)} matches no layer; there are "
            f"{_last_names(layers, METHODS[method].kinds)} "
            f"(or {', '.join(KEYWORDS)}, a path, a glob)"
        )
    return problems


def _report_passed_over(model: nn.Module, targets: Iterable[str]) -> None:
    if texts := [text for target in targets for text in _passed_over(model, target)]:
        note(f"not adapted, since they have no weight: {', '.join(dict.fromkeys(texts))}")


def _passed_over(model: nn.Module, target: str, *, named: bool = False) -> list[str]:
    """Modules that a target names and that have parameters but no weight, such as a GRU.

    Args:
        model: the model.
        target: a glob or a regular expression; others name one layer, which is checked.
        named: look at other targets, too.
    """
    is_pattern = target.startswith(_EXPRESSION) or any(mark in target for mark in "*?[")
    if not (is_pattern or named) or target.startswith(_EXCLUDES):
        return []
    texts = []
    for path, module in model.named_modules():
        own = [n for n, v in module.items() if isinstance(v, mx.array) and not n.startswith("_")]
        if own and path and kind_of(module) is None and _is_named(path, target):
            texts.append(f"{path.rpartition('.')[2]} ({type(module).__name__}: {', '.join(own)})")
    return list(dict.fromkeys(texts))


def _match_pattern(
    option: str,
    pattern: Mapping[str, Any],
    chosen: Mapping[str, Candidate],
    layers: Sequence[Candidate],
) -> tuple[dict[str, Any], list[str]]:
    """The number that a pattern sets for each chosen layer that it names, and its problems."""
    matches: dict[str, dict[str, Any]] = {
        path: {name: value for name, value in pattern.items() if _pattern_matches(layer, name)}
        for path, layer in chosen.items()
    }
    problems = [
        _unused(f"{option} {name}={value}", name, layers)
        for name, value in pattern.items()
        if not any(name in values for values in matches.values())
    ]
    disagreements: dict[str, list[str]] = {}
    for path, values in matches.items():
        if len(set(values.values())) > 1:
            pieces = " and ".join(f"{name}={value}" for name, value in values.items())
            disagreements.setdefault(pieces, []).append(path)
    problems += [
        f"{option}: {pieces} disagree on {', '.join(paths)}"
        for pieces, paths in disagreements.items()
    ]
    return {
        path: next(iter(values.values())) for path, values in matches.items() if values
    }, problems


def _unused(piece: str, name: str, layers: Sequence[Candidate]) -> str:
    """The problem of a piece of a pattern that names no chosen layer."""
    paths = dict.fromkeys(layer.path for layer in layers if _pattern_matches(layer, name))
    if paths:
        return f"{piece} names {', '.join(paths)}, not chosen: add it to --targets"
    return f"{piece} matches no layer; there are {_last_names(layers)}"


def _pattern_matches(layer: Candidate, name: str) -> bool:
    return layer.matches(name) or _is_named(layer.path, name)


def _config(
    layer: Candidate,
    method: str,
    rank: int | None,
    alpha: float | None,
    *,
    defaults: tuple[int, float],
) -> LayerConfig:
    """A layer's configuration: rank and alpha as patterns set them, or else the defaults."""
    variant = METHODS[method].on_feed_forward_ends
    if variant and any(_is_named(layer.path, end) for end in FEED_FORWARD_OUTPUTS):
        method = variant
    if not (layer.kind.ranked and METHODS[method].ranked):
        defaults = 1, 1.0
    rank = defaults[0] if rank is None else rank
    if alpha is None:
        alpha = float(rank) if METHODS[method].alpha_is_rank else defaults[1]
    return LayerConfig(rank, alpha, method, parts=layer.parts)
