"""What a low-rank update means for each kind of layer.

A `LayerKind` tells, for layers of one sort, which shapes A and B have, what their product is in the
weight's own layout, and what it adds to the layer's output. The methods (`graft.adapters.methods`)
are written once, in these terms. Knows nothing of methods, paths or files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from graft.models import is_quantized, linear_dims, weight_shape, with_arrays
from graft.runtime.cpu import DequantizingLinear

import mlx.core as mx
import mlx.nn as nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FusedParts:
    """How a fused projection is divided, and which of its parts are adapted.

    Attributes:
        names: of the parts, in their order, such as `("q", "k", "v")`.
        sizes: outputs of each part.
        enabled: names of those that are adapted, in their order.
        repeats: how often the division recurs, as where each head has its own q, k and v in a row;
            the layer has `repeats * sum(sizes)` outputs.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    enabled: tuple[str, ...]
    repeats: int = 1

    def outputs(self) -> list[int]:
        """How many outputs each enabled part has."""
        return [self.repeats * self.sizes[self.names.index(name)] for name in self.enabled]


@dataclass(frozen=True)
class LayerKind:
    """What a low-rank update means for one kind of layer.

    Attributes:
        name: as records have it.
        shapes: (base, rank) -> shapes of A and B.
        fan_in: base -> how many inputs a column of A sums over.
        largest_rank: base -> the highest rank that makes sense.
        product: (base, a, b) -> A B in the layout of the base's weight.
        update: (base, a, b, *inputs) -> what A B adds to the output; `None` for merge-first, where
            the base runs with the sum of its weight and the product.
        flat: weight -> the matrix that A times B makes when A has one row an input, `None` where
            there is no single one.
        norm: weight -> length of what each output sums over; `None` where DoRA is not defined.
        spread: (one value an output, *inputs) -> the same, to be multiplied with the output.
        input_alone: whether an output that is tied to the layer stays as it was.
        takes_ids: whether the layer's input is ids and not numbers, as an embedding's.
        ranked: whether A and B have a rank; a vector is trained whole.
        rank_axes: the axes of A and of B along which the rank runs.
        as_matrix: A or B -> a matrix, or a stack of matrices: (..., inputs, rank) of A and
            (..., rank, outputs) of B.
        from_matrix: (matrix, leading axes of A) -> A or B again; the leading axes are all but the
            last two, such as a convolution's window, and () for B.
    """

    name: str
    shapes: Callable[[nn.Module, int], tuple[Shape, Shape]]
    fan_in: Callable[[nn.Module], int]
    largest_rank: Callable[[nn.Module], int]
    product: Callable[[nn.Module, mx.array, mx.array], mx.array]
    update: Callable[..., mx.array] | None = None
    flat: Callable[[mx.array], mx.array] | None = None
    norm: Callable[[mx.array], mx.array] | None = None
    spread: Callable[..., mx.array] = lambda values, *inputs: values
    input_alone: bool = False
    takes_ids: bool = False
    ranked: bool = True
    rank_axes: tuple[int, int] = (-1, 0)
    as_matrix: Callable[[mx.array], mx.array] = lambda array: array
    from_matrix: Callable[[mx.array, Shape], mx.array] = lambda matrix, leading: matrix

    def draw(self, base: nn.Module, rank: int, key: mx.array | None) -> tuple[mx.array, mx.array]:
        """A uniform in +-1 / sqrt(fan_in) and B zero, float32."""
        a_shape, b_shape = self.shapes(base, rank)
        bound = 1 / math.sqrt(self.fan_in(base))
        return mx.random.uniform(-bound, bound, shape=a_shape, key=key), mx.zeros(b_shape)


def _row_norm(weight: mx.array) -> mx.array:
    """Length of each output's weights: all axes but the first."""
    return mx.linalg.norm(weight.astype(mx.float32).reshape(weight.shape[0], -1), axis=1)


def _linear_shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
    input_dims, output_dims = linear_dims(base)
    return (input_dims, rank), (rank, output_dims)


LINEAR = LayerKind(
    "linear",
    shapes=_linear_shapes,
    fan_in=lambda base: linear_dims(base)[0],
    largest_rank=lambda base: min(linear_dims(base)),
    product=lambda base, a, b: (a @ b).T,
    update=lambda base, a, b, x: (x @ a) @ b,
    flat=lambda weight: weight.T,
    norm=_row_norm,
)


# One row of A is looked up at a time, so the fan-in is 1. A is (vocabulary, rank), B (rank, dims).
EMBEDDING = LayerKind(
    "embedding",
    shapes=lambda base, rank: ((weight_shape(base)[0], rank), (rank, weight_shape(base)[1])),
    fan_in=lambda base: 1,
    largest_rank=lambda base: min(weight_shape(base)),
    product=lambda base, a, b: a @ b,
    update=lambda base, a, b, ids: a[ids] @ b,
    flat=lambda weight: weight,
    norm=_row_norm,
    spread=lambda values, ids: values[ids][..., None],
    takes_ids=True,
)


# The same at the input alone, as in PEFT: an output that is tied to the embedding stays as it was.
EMBEDDING_INPUT = replace(EMBEDDING, name="embedding-input", input_alone=True)

# The same with one length a dimension for DoRA, as in PEFT; mlx-lm has one a row.
EMBEDDING_COLUMNS = replace(
    EMBEDDING_INPUT,
    name="embedding-columns",
    norm=lambda weight: mx.linalg.norm(weight.astype(mx.float32), axis=0),
    spread=lambda values, ids: values,
)


def _conv_shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
    outputs, *window = base.weight.shape
    return (*window, rank), (rank, outputs)


def _conv_update(base: nn.Module, a: mx.array, b: mx.array, x: mx.array) -> mx.array:
    """The base's own convolution with A as its weight, then B at every place.

    With groups, A reads each group's channels in turn and each group's outputs take their own
    columns of B: this is what W + (A B)^T does.
    """
    groups = _groups(base)
    weight = mx.concatenate([mx.moveaxis(a, -1, 0)] * groups)
    z = with_arrays(base, {"weight": weight, "bias": None})(x)
    if groups == 1:
        return z @ b
    z = mx.unflatten(z, -1, (groups, -1))[..., None, :]
    per_group = mx.unflatten(b, -1, (groups, -1)).swapaxes(0, 1)
    return (z @ per_group).flatten(-3)


# The weight is (outputs, *window, inputs / groups), in MLX's channels-last layout; A is
# (*window, inputs / groups, rank) and B (rank, outputs).
CONV = LayerKind(
    "conv",
    shapes=_conv_shapes,
    fan_in=lambda base: math.prod(base.weight.shape[1:]),
    largest_rank=lambda base: min(base.weight.shape[0], math.prod(base.weight.shape[1:])),
    product=lambda base, a, b: (a.flatten(0, -2) @ b).T.reshape(base.weight.shape),
    update=_conv_update,
    flat=lambda weight: weight.reshape(weight.shape[0], -1).T,
    norm=_row_norm,
    as_matrix=lambda array: array.flatten(0, -2),
    from_matrix=lambda matrix, leading: mx.unflatten(matrix, 0, (*leading, -1)),
)


def _experts_shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
    experts, outputs, inputs = weight_shape(base)
    return (experts, rank, inputs), (experts, outputs, rank)


def _experts_update(
    base: nn.Module,
    a: mx.array,
    b: mx.array,
    x: mx.array,
    indices: mx.array,
    sorted_indices: bool = False,
) -> mx.array:
    def product(x: mx.array, matrices: mx.array) -> mx.array:
        transposed = matrices.swapaxes(-1, -2)
        return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)

    return product(product(x.astype(a.dtype), a), b)


# mlx-lm's layout: the weight is (experts, outputs, inputs), A (experts, rank, inputs) and B
# (experts, outputs, rank).
EXPERTS = LayerKind(
    "experts",
    shapes=_experts_shapes,
    fan_in=lambda base: weight_shape(base)[2],
    largest_rank=lambda base: min(weight_shape(base)[1:]),
    product=lambda base, a, b: b @ a,
    update=_experts_update,
    norm=lambda weight: mx.linalg.norm(weight.astype(mx.float32), axis=-1),
    spread=lambda values, x, indices, sorted_indices=False: values[indices][..., None, :],
    rank_axes=(-2, -1),
    as_matrix=lambda array: array.swapaxes(-1, -2),
    from_matrix=lambda matrix, leading: matrix.swapaxes(-1, -2),
)


def _matrix(base: nn.Module) -> tuple[int, int, int]:
    """(columns, rows, ranks a rank) of the matrix that merge-first makes of a weight.

    The columns are the last axis. A convolution's window is divided between rows and columns as in
    loralib, where a rank counts for as many ranks as the window is wide.
    """
    shape = weight_shape(base)
    if isinstance(base, CONVOLUTIONS):
        outputs, first, *others, inputs = shape
        return inputs * _groups(base) * first, outputs // _groups(base) * math.prod(others), first
    return shape[-1], math.prod(shape[:-1]), 1


def _groups(base: nn.Module) -> int:
    groups: int = getattr(base, "groups", 1)
    return groups


def _weight_shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
    columns, rows, times = _matrix(base)
    return (columns, rank * times), (rank * times, rows)


def _weight_product(base: nn.Module, a: mx.array, b: mx.array) -> mx.array:
    """(A B)^T in the weight's shape; for a convolution, in that of PyTorch's layout first."""
    shape = weight_shape(base)
    matrix = (a @ b).T
    if isinstance(base, CONVOLUTIONS):
        return mx.moveaxis(matrix.reshape(shape[0], shape[-1], *shape[1:-1]), 1, -1)
    return matrix.reshape(shape)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Merge-first: for layers whose output A and B cannot be added to, or by choice.
WEIGHT = LayerKind(
    "weight",
    shapes=_weight_shapes,
    fan_in=lambda base: _matrix(base)[0],
    largest_rank=lambda base: min(_matrix(base)[:2]) // _matrix(base)[2],
    product=_weight_product,
)

# Vectors have no rank: they are trained whole.
VECTOR = LayerKind(
    "vector",
    shapes=lambda base, rank: ((), ()),
    fan_in=lambda base: 1,
    largest_rank=lambda base: 1,
    product=lambda base, a, b: a * b,
    ranked=False,
)

# A projection with several parts; `fused_kind` makes the kind that fits the parts of a layer.
FUSED = replace(LINEAR, name="fused", flat=None, norm=None)

LAYER_KINDS = {
    kind.name: kind
    for kind in (
        *(LINEAR, EMBEDDING, EMBEDDING_INPUT, EMBEDDING_COLUMNS),
        *(CONV, EXPERTS, WEIGHT, VECTOR, FUSED),
    )
}


def fused_kind(parts: FusedParts) -> LayerKind:
    """A linear layer of several projections, of which some are adapted, each with its own A and B.

    A is (input_dims, parts * rank), one part after the other, and B (rank, outputs of the parts),
    as in loralib's `MergedLinear`, transposed.
    """
    sizes = parts.outputs()
    cuts = [sum(sizes[:number]) for number in range(1, len(sizes))]

    def shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        return (linear_dims(base)[0], len(sizes) * rank), (rank, sum(sizes))

    def outputs(z: mx.array, b: mx.array) -> mx.array:
        """From (..., parts * rank) to all outputs, zero where a part is not enabled.

        Adding -0.0 leaves every number as it is, -0.0 too.
        """
        halves = zip(mx.split(z, len(sizes), axis=-1), mx.split(b, cuts, axis=1), strict=True)
        by_name = dict(zip(parts.enabled, (part @ own for part, own in halves), strict=True))
        blocks = [
            mx.unflatten(by_name[name], -1, (parts.repeats, size))
            if name in by_name
            else mx.full((*z.shape[:-1], parts.repeats, size), -0.0)
            for name, size in zip(parts.names, parts.sizes, strict=True)
        ]
        return mx.concatenate(blocks, axis=-1).flatten(-2)

    return replace(
        FUSED,
        shapes=shapes,
        largest_rank=lambda base: min(linear_dims(base)[0], *sizes),
        product=lambda base, a, b: outputs(a, b).T,
        update=lambda base, a, b, x: outputs(x @ a, b),
    )


# From base type to kind. Types of mlx-lm stand by name, as importing it takes a second.
KINDS_BY_TYPE: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LINEAR,
    nn.QuantizedLinear: LINEAR,
    DequantizingLinear: LINEAR,
    nn.Embedding: EMBEDDING,
    nn.QuantizedEmbedding: EMBEDDING,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    "mlx_lm.models.switch_layers.SwitchLinear": EXPERTS,
    "mlx_lm.models.switch_layers.QuantizedSwitchLinear": EXPERTS,
}


def kind_of(module: nn.Module | None, parts: FusedParts | None = None) -> LayerKind | None:
    """The kind of a layer, or `None` if there is nothing to adapt in it.

    A subclass with a `__call__` of its own may do anything with its weight, and a type that is not
    in the table too, so these are merge-first. Vectors, as in norms, are trained whole.

    Args:
        module: the layer.
        parts: divides a linear layer, which makes it a fused projection.
    """
    for parent in type(module).__mro__:
        kind = KINDS_BY_TYPE.get(parent) or KINDS_BY_TYPE.get(
            f"{parent.__module__}.{parent.__qualname__}"
        )
        if kind is not None and parent.__call__ is type(module).__call__:
            return fused_kind(parts) if parts and kind is LINEAR else kind
    weight = None if module is None else module.get("weight")
    if module is None or not isinstance(weight, mx.array):
        return None
    if not (is_quantized(module) or mx.issubdtype(weight.dtype, mx.floating)):
        return None
    return VECTOR if weight.ndim == 1 else WEIGHT
