"""Chooses the layers of a model to adapt, and their rank and alpha, from names and patterns.

A target is a module's name (`q_proj`), the end of its path (`mlp.up_proj`), a whole path, a glob
over whole paths (`*.mlp.*`), a keyword such as `all-linear`, or one of these followed by the part
of a fused projection (`c_attn.q`). Knows module paths, kinds and methods; nothing of training.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.adapters.fused_projections import find_fused_parts
from graft.adapters.layer_config import LayerConfig, config_problems
from graft.adapters.layer_kinds import VECTOR, FusedParts, LayerKind, kind_of
from graft.adapters.methods import METHODS
from graft.errors import InputError
from graft.pretrained.architectures import FEED_FORWARD_OUTPUTS
from graft.pretrained.module_paths import natural_key

import mlx.nn as nn

ALL_LINEAR = "all-linear"

# Words that stand for all layers of a sort within the chosen blocks.
KEYWORDS: dict[str, Callable[["Candidate"], bool]] = {
    ALL_LINEAR: lambda layer: (
        layer.kind.name in ("linear", "experts") or isinstance(layer.module, nn.Linear)
    ),
    "all-norms": lambda layer: layer.kind is VECTOR,
    "all-biases": lambda layer: "bias" in layer.module,
}


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
    problems += config_problems({path: layer.module for path, layer in chosen.items()}, settings)
    if problems:
        raise InputError("; ".join(problems))
    return settings


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
    parts = find_fused_parts(layer.module, layer.path.rpartition(".")[2], parent)
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
    if on_ends and any(_names(layer.path, end) for end in FEED_FORWARD_OUTPUTS):
        method = on_ends
    without_rank = layer.kind is VECTOR or not METHODS[method].ranked
    rank, alpha = (1, 1.0) if without_rank else (rank, alpha)
    rank = rank if own_rank is None else own_rank
    if METHODS[method].alpha_is_rank:
        alpha = float(rank)
    alpha = alpha if own_alpha is None else own_alpha
    return LayerConfig(rank, alpha, method, parts=layer.parts)
