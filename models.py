"""What LoRA adapts and how: a frozen linear layer plus a trained low-rank update.

Knows MLX and nothing else of Graft. Architectures come from mlx-lm; `graft.adapters.attach` puts
these
layers into them, and `graft.adapters.adapted_layer` has the same for every other kind of layer.

    y = W x + scale * B^T (A^T x),   scale = alpha / rank

with W (output_dims, input_dims) frozen, A `lora_a` (input_dims, rank) and B `lora_b` (rank,
output_dims) trained. Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
(2021), https://arxiv.org/abs/2106.09685, equation 3. Over a quantized W this is QLoRA: Dettmers et
al. (2023), https://arxiv.org/abs/2305.14314.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

# Methods whose scale is alpha / sqrt(rank), which keeps the update's size at any rank:
# Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023),
# https://arxiv.org/abs/2312.03732.
RANK_STABILIZED = ("rslora",)


@runtime_checkable
class LoRALayer(Protocol):
    """What every adapted layer offers, whatever it adapts and by whatever method."""

    rank: int
    alpha: float
    kind: str
    method: str

    @property
    def scale(self) -> float:
        """The factor on the low-rank update."""
        ...

    @property
    def base(self) -> nn.Module:
        """The frozen layer under the adapter."""
        ...

    def delta(self) -> mx.array:
        """The update that the adapter adds, in the base weight's own layout, float32."""
        ...

    def deltas(self) -> dict[str, mx.array]:
        """The updates of all parameters that change, by their names in the base, float32."""
        ...

    def fuse(self, *, dequantize: bool = False) -> nn.Module:
        """A layer of the base's type with the update folded into its weight."""
        ...

    def merge(self) -> int:
        """Run the folded layer from here on; returns the bytes that are held for it."""
        ...

    def unmerge(self) -> None:
        """Run base and update apart again; the base was never touched."""
        ...

    def tensors(self) -> dict[str, mx.array]:
        """What a file has to hold of this layer, by name."""
        ...

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Take what `tensors` gave."""
        ...


def scale_of(method: str, rank: int, alpha: float) -> float:
    """The factor on a low-rank update: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / (math.sqrt(rank) if method in RANK_STABILIZED else rank)


def linear_dims(linear: nn.Module) -> tuple[int, int]:
    """(input_dims, output_dims) of an `nn.Linear` or `nn.QuantizedLinear`.

    A quantized weight has `bits` bits an input packed into 32-bit columns; 3, 5 and 6 bits straddle
    columns, so the product comes before the division.
    """
    shape = weight_shape(linear)
    return shape[1], shape[0]


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight, before quantization if it is quantized."""
    *rows, columns = module.weight.shape
    return (*rows, columns * 32 // module.bits if is_quantized(module) else columns)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is packed."""
    return "scales" in module


def dense_weight(module: nn.Module) -> mx.array:
    """A module's weight, dequantized if need be: (output_dims, input_dims) of a linear layer."""
    weight: mx.array = module.weight
    if not is_quantized(module):
        return weight
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    packed = weight, module.scales, module.biases
    per_expert = module.get("global_scale")
    if per_expert is None:
        return mx.dequantize(*packed, **settings)
    experts = [
        mx.dequantize(weight[e], module.scales[e], global_scale=per_expert[e], **settings)
        for e in range(weight.shape[0])
    ]
    return mx.stack(experts)


def with_arrays(module: nn.Module, arrays: Mapping[str, mx.array | None]) -> nn.Module:
    """The same layer with some of its arrays replaced, or taken away where `None` is given."""
    twin: nn.Module = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._no_grad = set(module._no_grad)
    dict.update(twin, module)
    for name, array in arrays.items():
        if array is None:
            twin.pop(name, None)
        else:
            twin[name] = array
    return twin


def dense_layer(module: nn.Module) -> nn.Module:
    """The layer itself, or for a quantized one the layer that it was made from.

    A quantized `nn.QuantizedLinear` was an `nn.Linear`; mlx-lm names its own in the same way.

    Raises:
        TypeError: no type of the name without `Quantized` is known.
    """
    if not is_quantized(module):
        return module
    dense: nn.Module = nn.Module.__new__(_dense_type(type(module)))
    nn.Module.__init__(dense)
    packed = ("weight", "scales", "biases", "global_scale")
    dict.update(dense, {name: array for name, array in module.items() if name not in packed})
    dense.weight = dense_weight(module)
    return dense


def fused(
    base: nn.Module, deltas: Mapping[str, mx.array], *, dequantize: bool = False
) -> nn.Module:
    """A layer like `base` with `deltas` added to its parameters, sharing all other arrays.

    A quantized base is quantized again with its own settings, which rounds the sum, unless
    `dequantize` asks for the whole weight; that takes 16 / bits as much memory in half precision.
    """
    dense = dense_layer(base) if "weight" in deltas else base
    sums = {
        name: (dense[name].astype(mx.float32) + delta).astype(dense[name].dtype)
        for name, delta in deltas.items()
    }
    if dequantize or dense is base:
        return with_arrays(dense, sums)
    return with_arrays(base, sums | _quantized_as(base, sums["weight"]))


def merge(layer: Any) -> int:
    """What `merge()` of every adapted layer does: keep a folded twin, and run that.

    The base stays as it is beside it. The cost is the memory of the folded arrays; for a quantized
    base this is a whole weight in the precision that it dequantizes to. What is trained is frozen,
    as it no longer has any effect.

    Returns:
        The bytes held for the twin; 0 if the layer is merged already.
    """
    if layer.merged is not None:
        return 0
    twin = layer.fuse(dequantize=True)
    added = [array for name, array in twin.items() if array is not layer.base.get(name)]
    mx.eval(added)
    # Past nn.Module's own setter: the twin is no child, so it is neither saved nor trained.
    object.__setattr__(layer, "merged", twin)
    layer.trained_before = set(layer._no_grad)
    layer.freeze(recurse=False)
    return sum(array.nbytes for array in added)


def unmerge(layer: Any) -> None:
    """What `unmerge()` of every adapted layer does: drop the twin, which costs nothing."""
    if layer.merged is not None:
        layer.merged = None
        layer._no_grad = layer.trained_before


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` or `nn.QuantizedLinear` with a trained low-rank update.

    A is drawn uniformly from +-1 / sqrt(input_dims) and B is zero, so an untrained layer gives what
    its base gives. A and B are float32 whatever the base is made of; the output has the base's
    dtype.

    Args:
        linear: the layer to adapt; it is frozen, and not copied.
        rank: columns of A and rows of B.
        alpha: numerator of the scale alpha / rank.
        method: `lora`, or another that differs in its scale or its start.
        dropout: probability of zeroing an input of A while training.
        key: randomness for A; MLX's global state by default.
    """

    kind = "linear"

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        *,
        alpha: float = 16.0,
        method: str = "lora",
        dropout: float = 0.0,
        key: mx.array | None = None,
    ) -> None:
        super().__init__()
        input_dims, output_dims = linear_dims(linear)
        bound = 1 / math.sqrt(input_dims)
        self.rank = rank
        self.alpha = alpha
        self.method = method
        self.linear = linear
        self.linear.freeze()
        self.merged: nn.Module | None = None
        self.dropout = nn.Dropout(p=dropout)
        self.lora_a = mx.random.uniform(-bound, bound, shape=(input_dims, rank), key=key)
        self.lora_b = mx.zeros((rank, output_dims))

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int = 8, **settings: Any) -> "LoRALinear":
        """Adapt `linear`; `settings` as for the constructor."""
        return cls(linear, rank, **settings)

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return scale_of(self.method, self.rank, self.alpha)

    @property
    def base(self) -> nn.Module:
        """The frozen linear layer."""
        return self.linear

    @property
    def weight(self) -> mx.array:
        """The adapted weight, for modules that read it instead of calling the layer."""
        return (self.merged or self.fuse(dequantize=True)).weight

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., input_dims) to (..., output_dims)."""
        if self.merged is not None:
            return self.merged(x)
        y = self.linear(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return y + (self.scale * z).astype(y.dtype)

    def delta(self) -> mx.array:
        """scale * (A B)^T: (output_dims, input_dims), float32."""
        return self.scale * (self.lora_a @ self.lora_b).T

    def deltas(self) -> dict[str, mx.array]:
        """The update of the weight; the bias stays."""
        return {"weight": self.delta()}

    def fuse(self, *, dequantize: bool = False) -> nn.Module:
        """A layer like the base with the update in its weight.

        A quantized base is quantized again with its own bits and group size, which rounds the sum;
        `dequantize` gives an `nn.Linear` instead.
        """
        return fused(self.linear, self.deltas(), dequantize=dequantize)

    def merge(self) -> int:
        """Run one folded matrix from here on; returns the bytes that are held for it.

        Over a quantized base that is a whole weight beside the packed one.
        """
        return merge(self)

    def unmerge(self) -> None:
        """Run base and update apart again, the base bit for bit as ever."""
        unmerge(self)

    def tensors(self) -> dict[str, mx.array]:
        """A and B by name."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Take A and B; a merged layer runs base and update apart again."""
        self.unmerge()
        self.update(dict(tensors))


def _dense_type(quantized: type) -> type:
    """The type that a quantized layer's type has a packed weight in place of."""
    for parent in quantized.__mro__:
        plain = parent.__name__.removeprefix("Quantized")
        if plain != parent.__name__:
            for module in (nn, sys.modules[parent.__module__]):
                if hasattr(module, plain):
                    dense: type = getattr(module, plain)
                    return dense
    raise TypeError(f"{quantized.__name__} has no known type without quantization")


def _quantized_as(base: nn.Module, weight: mx.array) -> dict[str, mx.array]:
    """The arrays of `weight` quantized with the settings of `base`."""
    settings = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    if base.get("global_scale") is None:
        return dict(
            zip(("weight", "scales", "biases"), mx.quantize(weight, **settings), strict=False)
        )
    largest = mx.abs(weight).max(axis=(-2, -1)).astype(mx.float32)
    experts = [
        mx.quantize(expert, global_scale=scale, **settings)
        for expert, scale in zip(weight, largest, strict=True)
    ]
    packed = (mx.stack(list(arrays)) for arrays in zip(*experts, strict=True))
    return {"global_scale": largest} | dict(zip(("weight", "scales"), packed, strict=True))
