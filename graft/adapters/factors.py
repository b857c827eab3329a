"""An adapter apart from any file: what every reader gives and every writer takes.

Tensors stand under Graft's own names (those of mlx-lm), and each layer's setting tells rank, alpha,
method and kind. A writer asks for `products`, the layers as A, B and scale. Knows no format.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import FusedParts
from graft.adapters.methods import METHODS
from graft.errors import InputError

import mlx.core as mx

# How the rows of q and k are ordered for rotary embeddings, where a format fixes it.
HALVES = "halves"
INTERLEAVED = "interleaved"

EMBEDDING_NAMES = ("embed_tokens", "tok_embeddings", "wte", "embed_in", "word_embeddings")
HALF_NAMES = {"lora_a": "A", "lora_b": "B"}


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        tensors: by their paths, `PATH.lora_a` (input_dims, rank) and `PATH.lora_b` (rank,
            output_dims) or what else the method trains.
        layers: from module path to rank, alpha, method and kind.
        base_model: the name of the model that it was trained on, where a file tells it.
        dropout: while training.
        rotary: how the rows of q and k are ordered; `None` is as in the base model.
        notes: what had to be assumed, a line each.
    """

    tensors: dict[str, mx.array]
    layers: dict[str, LayerConfig]
    base_model: str | None = None
    dropout: float = 0.0
    rotary: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Product:
    """One layer's update: the product of two matrices, scaled.

    Attributes:
        kind: linear, embedding, embedding-input, embedding-columns, conv or experts.
        a: (input_dims, rank); (vocabulary, rank) of an embedding, (experts, rank, input_dims) of
            experts, (*window, inputs, rank) of a convolution.
        b: (rank, output_dims); (experts, output_dims, rank) of experts.
        alpha: numerator of the scale.
        rank_stabilized: whether the scale is alpha / sqrt(rank).
        magnitude: what DoRA trains beside them, one value an output.
    """

    kind: str
    a: mx.array
    b: mx.array
    alpha: float
    rank_stabilized: bool = False
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """Of both matrices."""
        return int(self.b.shape[-1 if self.kind == "experts" else 0])

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def scaled(self, scale: float) -> "Product":
        """The same update at another scale: what differs goes into B, exact to rounding."""
        if scale == self.scale:
            return replace(self, alpha=alpha_for(scale, self.rank), rank_stabilized=False)
        return replace(
            self,
            b=self.b * (self.scale / scale),
            alpha=alpha_for(scale, self.rank),
            rank_stabilized=False,
        )

    def padded(self, rank: int) -> "Product":
        """The same update, at the same scale, with zeros up to a higher rank."""
        if rank == self.rank:
            return self
        more, experts = rank - self.rank, self.kind == "experts"
        a = _padded(self.a, -2 if experts else -1, more)
        b = _padded(self.b, -1 if experts else 0, more)
        alpha = alpha_for(self.scale, rank)
        return replace(self, a=a, b=b, alpha=alpha, rank_stabilized=False)


def _padded(array: mx.array, axis: int, more: int) -> mx.array:
    shape = list(array.shape)
    shape[axis] = more
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=axis)


def alpha_for(scale: float, rank: int) -> float:
    """An alpha whose quotient by `rank` is `scale` to the last bit, where there is one."""
    alpha = scale * rank
    near = (alpha, float(round(alpha)), math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((value for value in near if value / rank == scale), alpha)


def guess_kind(path: str, setting: LayerConfig, a: mx.array | None) -> str:
    """The kind of a layer without its model: as recorded, or by the rank of A and the name."""
    if setting.kind is not None:
        return setting.kind
    if a is not None and a.ndim == 3:
        return "experts"
    return "embedding" if path.rpartition(".")[2] in EMBEDDING_NAMES else "linear"


def products(
    adapter: Adapter, *, target: str, kinds: Container[str], dora: bool = False
) -> dict[str, Product]:
    """Every layer as A, B and scale.

    A fused projection becomes one linear layer with a rank a part, which is exact but larger.

    Args:
        adapter: what is to be written.
        target: the format's name, for the message.
        kinds: of layers that the format can hold.
        dora: whether it can hold DoRA.

    Raises:
        InputError: layers that the format cannot hold; all of them named.
    """
    found: dict[str, Product] = {}
    refused: list[str] = []
    for path, setting in adapter.layers.items():
        a, b = (adapter.tensors.get(f"{path}.{half}") for half in HALF_NAMES)
        kind = guess_kind(path, setting, a)
        method = METHODS[setting.method]
        if kind == "vector" or not (method.low_rank or (method.has_magnitude and dora)):
            refused.append(f"{path} ({setting.method}{', a vector' if kind == 'vector' else ''})")
        elif (kind if kind != "fused" else "linear") not in kinds:
            refused.append(f"{path} (of kind {kind})")
        else:
            assert a is not None and b is not None
            found[path] = _product(kind, a, b, setting, adapter.tensors.get(f"{path}.m"))
    if refused:
        raise InputError(f"{target} cannot hold these layers: {', '.join(refused)}")
    return found


def _product(
    kind: str, a: mx.array, b: mx.array, setting: LayerConfig, magnitude: mx.array | None
) -> Product:
    if setting.parts is not None:
        b = _spread_over_parts(b, setting.parts)
        kind = "linear"
    product = Product(kind, a, b, setting.alpha, METHODS[setting.method].rank_stabilized, magnitude)
    if product.rank == setting.rank:
        return product
    # Twice the rank where a start stands beside A and B; several where parts have their own.
    scale = setting.scale
    return replace(product, alpha=alpha_for(scale, product.rank), rank_stabilized=False)


def _spread_over_parts(b: mx.array, parts: FusedParts) -> mx.array:
    """B of a fused projection, (rank, outputs of the parts), as (parts * rank, all outputs)."""
    rows, first = [], 0
    for name, outputs in zip(parts.enabled, parts.outputs(), strict=True):
        columns = mx.unflatten(b[:, first : first + outputs], -1, (parts.repeats, -1))
        number = parts.names.index(name)
        before, after = sum(parts.sizes[:number]), sum(parts.sizes[number + 1 :])
        rows.append(mx.pad(columns, [(0, 0), (0, 0), (before, after)]).flatten(-2))
        first += outputs
    return mx.concatenate(rows)


def from_products(
    found: Mapping[str, Product],
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    rotary: str | None = None,
    notes: tuple[str, ...] = (),
) -> Adapter:
    """An adapter of products that a reader found; float32, as what is trained is.

    Raises:
        InputError: halves that do not belong together, or numbers that are none; all named.
    """
    problems = [problem for path, product in found.items() for problem in _problems(path, product)]
    if problems:
        raise InputError("; ".join(problems))
    tensors, layers = {}, {}
    for path, product in found.items():
        tensors[f"{path}.lora_a"] = product.a.astype(mx.float32)
        tensors[f"{path}.lora_b"] = product.b.astype(mx.float32)
        method = "rslora" if product.rank_stabilized else "lora"
        if product.magnitude is not None:
            tensors[f"{path}.m"] = product.magnitude.astype(mx.float32)
            method = "dora"
        # The type of the layer tells the others, which may have been guessed by their names.
        certain = product.kind == "conv" or product.kind.startswith("embedding-")
        kind = product.kind if certain else None
        alpha = product.alpha
        if product.magnitude is not None and product.rank_stabilized:
            alpha = alpha_for(product.scale, product.rank)
        layers[path] = LayerConfig(product.rank, alpha, method, kind)
    return Adapter(tensors, layers, base_model, dropout, rotary, notes)


def _problems(path: str, product: Product) -> list[str]:
    a, b = product.a, product.b
    experts = product.kind == "experts"
    ranks = (a.shape[-2], b.shape[-1]) if experts else (a.shape[-1], b.shape[0])
    if ranks[0] != ranks[1] or ranks[0] < 1 or (experts and a.shape[0] != b.shape[0]):
        return [f"{path}: A of shape {a.shape} and B of shape {b.shape} do not make a product"]
    found = []
    if not math.isfinite(product.alpha):
        found.append(f"{path}: alpha {product.alpha} is no number")
    for name, array in (("A", a), ("B", b), ("the magnitude", product.magnitude)):
        if array is not None and not mx.isfinite(array).all().item():
            found.append(f"{path}: {name} holds numbers that are not finite")
    return found


def paired(
    tensors: Mapping[str, mx.array], ends: Mapping[str, str]
) -> tuple[dict[str, dict[str, mx.array]], list[str]]:
    """Sort tensors by the layer that they belong to.

    Args:
        tensors: by name.
        ends: from the end of a name to what it is: "a", "b" or "m".

    Returns:
        From path to tensors by what they are, and the names that end in none of these.

    Raises:
        InputError: layers lack one half; all of them named.
    """
    found: dict[str, dict[str, mx.array]] = {}
    others = []
    for name, array in tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            others.append(name)
        else:
            found.setdefault(name.removesuffix(end), {})[ends[end]] = array
    missing = [
        f"{path or '(no name)'} has no {half.upper()}"
        for path, halves in found.items()
        for half in ("a", "b")
        if half not in halves
    ]
    if missing:
        raise InputError(f"half a layer: {', '.join(missing)}")
    return found, others
