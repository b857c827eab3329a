"""The kinds of layers that can be adapted, and what a low-rank update means for each.

A `LayerKind` defines, for one kind of layer, the shapes of A and B, their product in the layout of
the weight, and what it adds to the layer's output. The methods (`graft.adapters.methods`) are
written once, in these terms. Knows nothing of methods, paths or files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from graft.models import is_quantized, linear_dims, weight_shape, with_arrays
from graft.pretrained.architectures import EXPERT_LAYERS
from graft.runtime.cpu import DequantizingLinear

import mlx.core as mx
import mlx.nn as nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FusedParts:
    """The parts of a fused projection, and which of them are adapted.

    Attributes:
        names: names of the parts in order, such as `("q", "k", "v")`.
        sizes: outputs of each part.
        enabled: names of the adapted parts, in order.
        repeats: how many times the sequence of parts recurs, such as once per head; the layer has
            `repeats * sum(sizes)` outputs.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    enabled: tuple[str, ...]
    repeats: int = 1

    def outputs(self) -> list[int]:
        """The number of outputs of each enabled part."""
        return [self.repeats * self.sizes[self.names.index(name)] for name in self.enabled]


@dataclass(frozen=True)
class LayerKind:
    """What a low-rank update means for one kind of layer.

    Attributes:
        name: the name in adapter files.
        shapes: (base, rank) -> shapes of A and B.
        fan_in: base -> number of inputs that a column of A sums over.
        largest_rank: base -> the highest useful rank.
        product: (base, a, b) -> A B in the layout of the base's weight.
        update: (base, a, b, *inputs) -> what A B adds to the output; `None` for merge-first, where
            the base runs with the sum of its weight and the product.
        flat: weight -> the weight as a matrix (inputs, outputs), the shape of A B if A has one row
            per input; `None` if the weight is not a single matrix.
        norm: weight -> the norm of each output's weights; `None` if DoRA is not defined.
        spread: (one value per output, *inputs) -> the values, shaped to multiply the output.
        input_alone: whether an output that is tied to the layer stays unadapted.
        takes_ids: whether the layer's input is token ids, as an embedding's.
        ranked: whether A and B have a rank; vectors have none and are trained whole.
        rank_axes: the axes of A and of B that have the size of the rank.
        as_matrix: A or B -> a matrix or a stack of matrices: (..., inputs, rank) for A and
            (..., rank, outputs) for B.
        from_matrix: (matrix, leading axes) -> A or B again; the leading axes are those of A but the
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
        """Initial A, uniform in +-1 / sqrt(fan_in), and B, zero; both float32."""
        a_shape, b_shape = self.shapes(base, rank)
        bound = 1 / math.sqrt(self.fan_in(base))
        return mx.random.uniform(-bound, bound, shape=a_shape, key=key), mx.zeros(b_shape)


def _row_norm(weight: mx.array) -> mx.array:
    """The norm of each output's weights, over all axes but the first."""
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


# A is (vocabulary, rank), B (rank, dims). One row of A is looked up at a time: the fan-in is 1.
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


# As in PEFT: only the input is adapted; an output that is tied to the embedding is not.
EMBEDDING_INPUT = replace(EMBEDDING, name="embedding-input", input_alone=True)

# As in PEFT: DoRA has one magnitude per dimension; in mlx-lm it has one per row.
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
    """The base's convolution with A as its weight, then B at every position.

    With groups, A reads the channels of each group in turn, and each group's outputs use their own
    columns of B, as with the weight W + (A B)^T.
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
    """(columns, rows, factor on the rank) of the matrix that merge-first reshapes a weight to.

    The columns are the last axis. As in loralib, a convolution's window is divided between rows and
    columns, and its rank is multiplied by the width of the window.
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
    columns, rows, factor = _matrix(base)
    return (columns, rank * factor), (rank * factor, rows)


def _weight_product(base: nn.Module, a: mx.array, b: mx.array) -> mx.array:
    """(A B)^T in the weight's shape; a convolution's is first reshaped to PyTorch's layout."""
    shape = weight_shape(base)
    matrix = (a @ b).T
    if isinstance(base, CONVOLUTIONS):
        return mx.moveaxis(matrix.reshape(shape[0], shape[-1], *shape[1:-1]), 1, -1)
    return matrix.reshape(shape)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Merge-first: for layers of unknown types, and by choice for all others.
WEIGHT = LayerKind(
    "weight",
    shapes=_weight_shapes,
    fan_in=lambda base: _matrix(base)[0],
    largest_rank=lambda base: min(_matrix(base)[:2]) // _matrix(base)[2],
    product=_weight_product,
)

# Vectors have no rank and are trained whole.
VECTOR = LayerKind(
    "vector",
    shapes=lambda base, rank: ((), ()),
    fan_in=lambda base: 1,
    largest_rank=lambda base: 1,
    product=lambda base, a, b: a * b,
    ranked=False,
)

# A fused projection with adapted parts; `fused_kind` fills in what depends on the parts.
FUSED = replace(LINEAR, name="fused", flat=None, norm=None)

LAYER_KINDS = {
    kind.name: kind
    for kind in (
        *(LINEAR, EMBEDDING, EMBEDDING_INPUT, EMBEDDING_COLUMNS),
        *(CONV, EXPERTS, WEIGHT, VECTOR, FUSED),
    )
}


def fused_kind(parts: FusedParts) -> LayerKind:
    """The kind of a fused projection whose enabled parts each have their own A and B.

    A is (input_dims, parts * rank), one part after another, and B (rank, outputs of the parts), the
    transpose of loralib's `MergedLinear`.
    """
    sizes = parts.outputs()
    cuts = [sum(sizes[:number]) for number in range(1, len(sizes))]

    def shapes(base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        return (linear_dims(base)[0], len(sizes) * rank), (rank, sum(sizes))

    def outputs(z: mx.array, b: mx.array) -> mx.array:
        """From (..., parts * rank) to all outputs: zero for parts that are not enabled.

        The zero is -0.0, since adding it changes no number, not even -0.0.
        """
        pairs = zip(mx.split(z, len(sizes), axis=-1), mx.split(b, cuts, axis=1), strict=True)
        products = (z_part @ b_part for z_part, b_part in pairs)
        by_name = dict(zip(parts.enabled, products, strict=True))
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


# From base type to kind. Types of mlx-lm are given by name, since importing it takes a second.
KINDS_BY_TYPE: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LINEAR,
    nn.QuantizedLinear: LINEAR,
    DequantizingLinear: LINEAR,
    nn.Embedding: EMBEDDING,
    nn.QuantizedEmbedding: EMBEDDING,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    **dict.fromkeys(EXPERT_LAYERS, EXPERTS),
}


def kind_of(module: nn.Module | None, parts: FusedParts | None = None) -> LayerKind | None:
    """The kind of a layer, or `None` if there is nothing to adapt in it.

    A type that is not in the table, or a subclass that overrides `__call__`, may do anything with
    its weight, so it is adapted merge-first. Vectors, such as those of norms, are trained whole.

    Args:
        module: the layer.
        parts: the parts of a linear layer that is a fused projection.
    """
    for parent in type(module).__mro__:
        name = f"{parent.__module__}.{parent.__qualname__}"
        kind = KINDS_BY_TYPE.get(parent) or KINDS_BY_TYPE.get(name)
        if kind is not None and parent.__call__ is type(module).__call__:
            return fused_kind(parts) if parts and kind is LINEAR else kind
    weight = None if module is None else module.get("weight")
    if module is None or not isinstance(weight, mx.array):
        return None
    if not (is_quantized(module) or mx.issubdtype(weight.dtype, mx.floating)):
        return None
    return VECTOR if weight.ndim == 1 else WEIGHT
