"""One adapter of several, a smaller one of a large one, and one between two models.

python -m graft merge A B --weights 0.7,0.3 --method svd --rank 8 --out merged
python -m graft extract --base M0 --tuned M1 --rank 16 --out difference

Every layer is worked on by itself, as A B of (inputs, rank) and (rank, outputs) with the scale
inside.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from graft.adapters.factors import EMBEDDING_NAMES, Product, from_products, products
from graft.adapters.files import find_adapter, load_adapter
from graft.adapters.formats import Adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.rotary import reordered
from graft.adapters.svd import truncated_svd
from graft.cli.command import Parser, command
from graft.errors import InputError
from graft.exporting.adapter import as_adapter, export, find_base
from graft.models import dense_weight, weight_shape, with_arrays
from graft.pretrained.folder import find_folder
from graft.pretrained.lazy_model import BaseFiles, open_base
from graft.pretrained.module_paths import natural_key
from graft.storage.lazy_tensors import read

import mlx.core as mx

KINDS = ("linear", "embedding", "embedding-input", "conv", "experts")
DENSITY = 0.5
Factors = tuple[mx.array, mx.array]


def build_merge_parser() -> argparse.ArgumentParser:
    """The parser of `merge`."""
    parser = Parser(description="Make one adapter of several.")
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="of any tool, all for one base model")
    add(
        "--weights",
        metavar="W,W,...",
        help="a number each (default: 1 for ties, else equal)",
    )
    add(
        "--method", choices=METHODS, default="cat", help="how to combine them (cat, which is exact)"
    )
    add("--rank", type=int, metavar="R", help="of the result, by SVD (default: as it comes)")
    add(
        "--density",
        type=float,
        default=DENSITY,
        metavar="X",
        help=f"share of a change that ties and dare keep ({DENSITY})",
    )
    add("--seed", type=int, default=0, metavar="N", help="of what dare drops")
    add("--model", metavar="BASE", help="base model (default: as recorded)")
    add("--out", required=True, metavar="PATH", help="folder, or .npz or .safetensors file")
    add("--force", action="store_true", help="replace what stands at PATH")
    return parser


def build_extract_parser() -> argparse.ArgumentParser:
    """The parser of `extract`."""
    parser = Parser(description="Find the adapter between two models.")
    add = parser.add_argument
    add("--base", required=True, metavar="M0", help="folder or Hub name")
    add("--tuned", required=True, metavar="M1", help="folder or Hub name")
    add("--rank", type=int, required=True, metavar="R", help="of every layer")
    add("--out", required=True, metavar="PATH", help="folder, or .npz or .safetensors file")
    add("--force", action="store_true", help="replace what stands at PATH")
    return parser


# ---- combining -------------------------------------------------------------------------------


def concatenated(parts: Sequence[Product], weights: Sequence[float]) -> Factors:
    """The weighted sum of the updates, exactly: A side by side, B one under the other."""
    a = mx.concatenate([rows(p) for p in parts], axis=-1)
    scaled = [w * p.scale * columns(p) for p, w in zip(parts, weights, strict=True)]
    return a, mx.concatenate(scaled, axis=-2)


def averaged(parts: Sequence[Product], weights: Sequence[float]) -> Factors:
    """The sums of the A and of the B, each weighted by the square root of weight times scale.

    At one rank, the result has that rank; products of one's A with another's B come in, so it is
    for adapters of one start. As PEFT's "linear".

    Raises:
        InputError: ranks differ, or a weight is below 0.
    """
    ranks = {part.rank for part in parts}
    if len(ranks) > 1 or min(weights) < 0:
        raise InputError(
            f"linear needs one rank and weights of at least 0, not ranks {sorted(ranks)} and "
            f"weights {list(weights)}; cat takes any"
        )
    roots = [math.sqrt(w * p.scale) for p, w in zip(parts, weights, strict=True)]
    a = [root * rows(part) for root, part in zip(roots, parts, strict=True)]
    b = [root * columns(part) for root, part in zip(roots, parts, strict=True)]
    return mx.stack(a).sum(axis=0), mx.stack(b).sum(axis=0)


def ties(deltas: Sequence[mx.array], weights: Sequence[float], density: float) -> mx.array:
    """Trim, elect sign, merge.

    Each change keeps its largest entries. The sign of an entry is that of the sum, and the weighted
    entries that agree with it are averaged.

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023),
    https://arxiv.org/abs/2306.01708, algorithm 1, with weights as in PEFT.

    Args:
        deltas: of one shape.
        weights: one for each.
        density: the share that is kept.
    """
    trimmed = mx.stack([trim(delta, density) for delta in deltas])
    factors = mx.array(list(weights)).reshape(-1, *[1] * (trimmed.ndim - 1))
    elected = mx.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agreeing = mx.sign(trimmed) == elected
    total = (trimmed * factors * agreeing).sum(axis=0)
    return total / mx.maximum(agreeing.sum(axis=0), 1)


def trim(delta: mx.array, density: float) -> mx.array:
    """The share `density` of the entries that are largest, and zero for the others."""
    kept = int(density * delta.size)
    if kept >= delta.size:
        return delta
    if kept == 0:
        return mx.zeros_like(delta)
    sizes = mx.abs(delta).flatten()
    threshold = mx.sort(sizes)[delta.size - kept]
    return mx.where(mx.abs(delta) >= threshold, delta, 0)


def dare(
    deltas: Sequence[mx.array], weights: Sequence[float], density: float, key: mx.array
) -> mx.array:
    """Drop entries at random, make up for them, and sum.

    Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
    Models as a Free Lunch" (2023), https://arxiv.org/abs/2311.03099, equation 1.

    Args:
        deltas: of one shape.
        weights: one for each.
        density: the probability of keeping an entry.
        key: randomness.
    """
    total = mx.zeros_like(deltas[0])
    for delta, weight, own in zip(deltas, weights, mx.random.split(key, len(deltas)), strict=True):
        kept = mx.random.bernoulli(density, delta.shape, key=own)
        total = total + weight * mx.where(kept, delta / density, 0)
    return total


METHODS: dict[str, str] = {
    "linear": "sums of the A and of the B",
    "cat": "the exact sum, at the sum of the ranks",
    "svd": "the exact sum, at a lower rank",
    "ties": "trimmed, and signs elected",
    "dare": "dropped at random, and made up for",
}


def rows(product: Product) -> mx.array:
    """A as (..., inputs, rank)."""
    a = product.a.astype(mx.float32)
    if product.kind == "experts":
        return a.swapaxes(-1, -2)
    return a.flatten(0, -2) if product.kind == "conv" else a


def columns(product: Product) -> mx.array:
    """B as (..., rank, outputs)."""
    b = product.b.astype(mx.float32)
    return b.swapaxes(-1, -2) if product.kind == "experts" else b


def shrink(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest product of a rank, and the share of the energy (squares of the entries) lost.

    A B = Qa (Ra Rb^T) Qb^T, so the large product is never made.
    """
    with mx.stream(mx.cpu):
        qa, ra = mx.linalg.qr(factors[0])
        qb, rb = mx.linalg.qr(factors[1].swapaxes(-1, -2))
        u, s, vt = mx.linalg.svd(ra @ rb.swapaxes(-1, -2))
        kept = min(rank, s.shape[-1])
        root = mx.sqrt(s[..., :kept])
        a = (qa @ u[..., :kept]) * root[..., None, :]
        b = root[..., :, None] * (vt[..., :kept, :] @ qb.swapaxes(-1, -2))
        energy, left = mx.square(s).sum(), mx.square(s[..., kept:]).sum()
        lost = cast(float, (left / mx.maximum(energy, 1e-30)).item())
    return (a, b), lost


def decompose(delta: mx.array, rank: int) -> tuple[Factors, float]:
    """A and B of a rank nearest to a matrix (inputs, outputs), and the share of the energy lost."""
    kept = min(rank, *delta.shape[-2:])
    energy = cast(float, mx.square(delta).sum().item())
    if delta.ndim == 2:
        u, s, vt = truncated_svd(delta, kept)
    else:
        u, s, vt = mx.linalg.svd(delta, stream=mx.cpu)
        u, s, vt = u[..., :kept], s[..., :kept], vt[..., :kept, :]
    root = mx.sqrt(s)
    lost = 1 - cast(float, mx.square(s).sum().item()) / max(energy, 1e-30)
    return (u * root[..., None, :], root[..., :, None] * vt), max(lost, 0.0)


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float = DENSITY,
    seed: int = 0,
) -> tuple[Adapter, dict[str, float]]:
    """One adapter of several; a layer that some lack counts as no change there.

    Args:
        adapters: for one base model.
        weights: one for each.
        method: one of `METHODS`.
        rank: of the result; needed for svd, and for ties and dare by default the highest rank.
        density: the share that ties and dare keep.
        seed: of what dare drops.

    Returns:
        The adapter, and for each layer the share of the energy that a lower rank lost.

    Raises:
        InputError: layers are more than A and B or do not have the same shapes in all adapters;
            all of them named.
    """
    found = [products(adapter, target="merge", kinds=KINDS) for adapter in adapters]
    _check_shapes(found)
    paths = sorted({path for each in found for path in each}, key=natural_key)
    merged: dict[str, Product] = {}
    losses: dict[str, float] = {}
    for number, path in enumerate(paths):
        pairs = [(each[path], w) for each, w in zip(found, weights, strict=True) if path in each]
        parts, own = [part for part, _ in pairs], [weight for _, weight in pairs]
        key = mx.random.key(seed * 1_000_003 + number)
        factors, losses[path] = _combine(
            parts, own, method=method, rank=rank, density=density, key=key
        )
        merged[path] = _product(parts[0], *factors)
        mx.eval(merged[path].a, merged[path].b)
    first = adapters[0]
    return from_products(merged, base_model=first.base_model, rotary=first.rotary), losses


def _combine(
    parts: Sequence[Product],
    weights: Sequence[float],
    *,
    method: str,
    rank: int | None,
    density: float,
    key: mx.array,
) -> tuple[Factors, float]:
    if method in ("ties", "dare"):
        deltas = [part.scale * (rows(part) @ columns(part)) for part in parts]
        if method == "ties":
            delta = ties(deltas, weights, density)
        else:
            delta = dare(deltas, weights, density, key)
        return decompose(delta, rank or max(part.rank for part in parts))
    combine: Callable[..., Factors] = averaged if method == "linear" else concatenated
    factors = combine(parts, weights)
    # More ranks than a matrix has rows or columns are not needed to hold it.
    largest = min(factors[0].shape[-2], factors[1].shape[-1])
    if rank is None and factors[0].shape[-1] <= largest:
        return factors, 0.0
    return shrink(factors, rank or largest)


def _product(like: Product, a: mx.array, b: mx.array) -> Product:
    """A and B with the scale inside, in the layout of a kind; the scale is 1."""
    rank = a.shape[-1]
    if like.kind == "experts":
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    elif like.kind == "conv":
        a = a.reshape(*like.a.shape[:-1], rank)
    return Product(like.kind, a, b, float(rank))


def _check_shapes(found: Sequence[Mapping[str, Product]]) -> None:
    def shape(product: Product) -> tuple[Any, ...]:
        return product.kind, rows(product).shape[:-1], columns(product).shape[-1]

    problems = []
    for path in {path for each in found for path in each}:
        shapes = {shape(each[path]) for each in found if path in each}
        if len(shapes) > 1:
            problems.append(path)
    if problems:
        raise InputError(
            f"not adapters of one base model: {', '.join(sorted(problems))} differ in shape or kind"
        )


@command
def main_merge(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says, and print what a lower rank lost."""
    args = build_merge_parser().parse_args(argv)
    weights = _weights(args.weights, len(args.adapters), method=args.method)
    _check_numbers(args.rank, args.density, method=args.method)
    adapters, bases = [], []
    for name in args.adapters:
        source = find_adapter(Path(name))
        tensors, record = load_adapter(source)
        bases.append(find_base(source, tensors, record, args.model))
        adapters.append(as_adapter(tensors, record))
    base = next((base for base in bases if base is not None), None)
    orders = {adapter.rotary for adapter in adapters}
    if len(orders) > 1:
        if base is None:
            raise InputError("q and k are ordered differently: name the base model with --model")
        ordered = [replace(a, rotary=a.rotary or base.rotary) for a in adapters]
        adapters = [reordered(adapter, base.rotary, base.heads) for adapter in ordered]
    for note in differences(args.adapters, adapters):
        print(f"note: {note}", file=sys.stderr)
    merged, losses = merge(
        adapters, weights, method=args.method, rank=args.rank, density=args.density, seed=args.seed
    )
    export(merged, Path(args.out), form="npz", base=base, force=args.force)
    _report(args.out, merged, losses, always=args.rank is not None)
    return 0


def differences(names: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """In what adapters that are to be merged differ, as far as merging takes it in silence."""
    notes = []
    bases = {adapter.base_model for adapter in adapters}
    if len(bases) > 1:
        told = (f"{name}: {a.base_model}" for name, a in zip(names, adapters, strict=True))
        notes.append(f"their records name other base models, taken for one ({', '.join(told)})")
    everything = {path for adapter in adapters for path in adapter.layers}
    for name, adapter in zip(names, adapters, strict=True):
        lacking = sorted(everything - adapter.layers.keys(), key=natural_key)
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            notes.append(
                f"{name} has no change of {', '.join(lacking[:3])}{more}: taken for a change of 0"
            )
    return notes


def _weights(text: str | None, count: int, *, method: str) -> list[float]:
    if text is None:
        return [1.0 if method == "ties" else 1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: give numbers with commas between") from None
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise InputError(f"--weights {text}: give {count} numbers, one for each adapter")
    return weights


def _check_numbers(rank: int | None, density: float, *, method: str) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank}: give at least 1")
    if rank is None and method == "svd":
        raise InputError("svd needs --rank; cat is the same at the sum of the ranks")
    if not 0 < density <= 1:
        raise InputError(f"--density {density}: give more than 0 and at most 1")


def _report(out: str, adapter: Adapter, losses: Mapping[str, float], *, always: bool) -> None:
    ranks = sorted({setting.rank for setting in adapter.layers.values()})
    print(f"wrote {out}: {len(adapter.layers)} layers, rank {', '.join(map(str, ranks))}")
    if always or any(loss > 0 for loss in losses.values()):
        worst = max(losses, key=lambda path: losses[path])
        mean = sum(losses.values()) / len(losses)
        print(f"energy lost: mean {mean:.2%}, most {losses[worst]:.2%} in {worst}")


# ---- extracting ------------------------------------------------------------------------------


@command
def main_extract(argv: Sequence[str] | None = None) -> int:
    """Extract as the command line says, and print what the rank lost."""
    args = build_extract_parser().parse_args(argv)
    _check_numbers(args.rank, 1.0, method="extract")
    adapter, losses, notes = extract(args.base, args.tuned, rank=args.rank)
    export(adapter, Path(args.out), form="npz", base=None, force=args.force)
    _report(args.out, adapter, losses, always=True)
    for note in notes:
        print(note)
    return 0


def extract(base: str, tuned: str, *, rank: int) -> tuple[Adapter, dict[str, float], list[str]]:
    """The adapter between two models of one architecture, layer by layer.

    Matrices become A and B; vectors, such as norms, are kept whole where they differ.

    Args:
        base: folder or Hub name.
        tuned: folder or Hub name.
        rank: of every matrix.

    Returns:
        The adapter, for each layer the share of the energy lost, and notes on what was left out.

    Raises:
        InputError: the models are not of one architecture, or do not differ.
    """
    with ExitStack() as stack:
        places = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)]
        first, second = (
            stack.enter_context(open_base(find_folder(name), Path(place)))
            for name, place in zip((base, tuned), places, strict=True)
        )
        _check_same_architecture(first, second)
        tensors: dict[str, mx.array] = {}
        layers: dict[str, LayerConfig] = {}
        losses: dict[str, float] = {}
        notes: list[str] = []
        for path in dict(first.model.named_modules()):
            if f"{path}.weight" in first.tensors:
                _extract_layer(path, first, second, rank, tensors, layers, losses, notes)
    if not layers:
        raise InputError(f"{base} and {tuned} do not differ")
    return Adapter(tensors, layers, base), losses, notes


def _extract_layer(
    path: str,
    first: BaseFiles,
    second: BaseFiles,
    rank: int,
    tensors: dict[str, mx.array],
    layers: dict[str, LayerConfig],
    losses: dict[str, float],
    notes: list[str],
) -> None:
    one, two = (_arrays(path, base) for base in (first, second))
    delta = two["weight"] - one["weight"]
    bias = two.get("bias", mx.zeros(())) - one.get("bias", mx.zeros(()))
    if delta.ndim == 1:
        if mx.any(delta).item() or mx.any(bias).item():
            layers[path] = LayerConfig(1, 1.0, "norm", "vector")
            tensors[f"{path}.delta_weight"] = delta
            if "bias" in one:
                tensors[f"{path}.delta_bias"] = bias
        return
    if mx.any(bias).item():
        norm = cast(float, mx.linalg.norm(bias).item())
        notes.append(f"left out: the change of {path}.bias, of length {norm:.3g}")
    if not mx.any(delta).item():
        return
    if delta.ndim > 3 or (delta.ndim == 3 and "switch" not in path and "experts" not in path):
        notes.append(f"left out: the change of {path}, which is neither a matrix nor experts")
        return
    embedding = path.rpartition(".")[2] in EMBEDDING_NAMES
    matrix = delta if embedding else delta.swapaxes(-1, -2)
    (a, b), losses[path] = decompose(matrix, rank)
    kind = "experts" if delta.ndim == 3 else "embedding" if embedding else "linear"
    product = _product(Product(kind, a, b, 1.0), a, b)
    tensors |= {f"{path}.lora_a": product.a, f"{path}.lora_b": product.b}
    layers[path] = LayerConfig(product.rank, float(product.rank))
    mx.eval(product.a, product.b)


def _arrays(path: str, base: BaseFiles) -> dict[str, mx.array]:
    """Weight and bias of a layer, float32 and whole."""
    module = dict(base.model.named_modules())[path]
    names = [n for n in module if f"{path}.{n}" in base.tensors]
    module = with_arrays(module, {n: read(base.tensors[f"{path}.{n}"]) for n in names})
    found = {"weight": dense_weight(module).astype(mx.float32)}
    if "bias" in module:
        found["bias"] = module.bias.astype(mx.float32)
    return found


def _check_same_architecture(first: BaseFiles, second: BaseFiles) -> None:
    def shapes(base: BaseFiles) -> dict[str, Any]:
        modules = dict(base.model.named_modules())
        return {p: weight_shape(m) for p, m in modules.items() if f"{p}.weight" in base.tensors}

    one, two = shapes(first), shapes(second)
    differing = [path for path in one.keys() | two.keys() if one.get(path) != two.get(path)]
    orders = [bool(base.config.get("rope_traditional")) for base in (first, second)]
    if differing:
        raise InputError(
            f"{first.folder} and {second.folder} are not of one architecture: "
            f"{', '.join(sorted(differing, key=natural_key))} differ"
        )
    if orders[0] != orders[1]:
        traditional, other = (first, second) if orders[0] else (second, first)
        raise InputError(
            f"{traditional.folder} has q and k interleaved (rope_traditional) and {other.folder} "
            "has not: convert both from one layout"
        )
