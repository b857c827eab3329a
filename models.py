"""The LoRA layer: a frozen linear layer with a trained low-rank update.

    y = W x + scale * B^T (A^T x),   scale = alpha / rank

W (output_dims, input_dims) is frozen; A, `lora_a` (input_dims, rank), and B, `lora_b` (rank,
output_dims), are trained. Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models" (2021), https://arxiv.org/abs/2106.09685, equation 3. If W is quantized, this is QLoRA:
Dettmers et al. (2023), https://arxiv.org/abs/2305.14314.

`LoRALinear` is that layer, `LoRALayer` the base class of every adapted layer. Other kinds of layers
and other methods are in `graft.adapters`; `graft.adapters.attach` puts the layers into a model.
This module imports MLX and the standard library only.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def scale_of(rank: int, alpha: float, *, rank_stabilized: bool = False) -> float:
    """The factor on a low-rank update: alpha / rank, or alpha / sqrt(rank) if rank-stabilized.

    The square root keeps the update's size the same at any rank: Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023),
    https://arxiv.org/abs/2312.03732.
    """
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


class LoRALayer(nn.Module):
    """A frozen layer with a trained update: the base class of every adapted layer.

    Subclasses implement `deltas`, `tensors` and `__call__`, which calls `merged` while it is set.

    Args:
        base: the layer to adapt; it is frozen, not copied.
        rank: rank of the update.
        alpha: numerator of the scale.
        method: name of the method, as adapter files record it.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    kind: str

    def __init__(
        self, base: nn.Module, rank: int, *, alpha: float, method: str, rank_stabilized: bool
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.method = method
        self.rank_stabilized = rank_stabilized
        self.linear = base
        self.linear.freeze()
        self.merged: nn.Module | None = None

    @property
    def scale(self) -> float:
        """The factor on the update."""
        return scale_of(self.rank, self.alpha, rank_stabilized=self.rank_stabilized)

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.linear

    @property
    def weight(self) -> mx.array:
        """The adapted weight, for modules that read the weight instead of calling the layer."""
        return (self.merged or self.fuse(dequantize=True)).weight

    def deltas(self) -> dict[str, mx.array]:
        """The changes of the base's parameters, by parameter name, float32."""
        raise NotImplementedError

    def tensors(self) -> dict[str, mx.array]:
        """The tensors that an adapter file stores for this layer, by name."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Set the tensors that `tensors` returns; a merged layer is unmerged first."""
        self.unmerge()
        self.update(dict(tensors))

    def delta(self) -> mx.array:
        """The change of the base's weight, or of its bias if only that is trained, float32."""
        return next(iter(self.deltas().values()))

    def fuse(self, *, dequantize: bool = False) -> nn.Module:
        """A layer of the base's type with the update added to its parameters.

        A quantized base is quantized again with its own settings, which rounds the sum;
        `dequantize` returns an unquantized layer instead.
        """
        return fused(self.linear, self.deltas(), dequantize=dequantize)

    def merge(self) -> int:
        """Run a fused copy of the layer from now on; the base itself does not change.

        The copy holds its own arrays for what the update changes: over a quantized base, a full
        weight in the precision that it dequantizes to. Until `unmerge`, the adapter's parameters
        have no effect and are frozen.

        Returns:
            The bytes that the copy takes; 0 if the layer is merged already.
        """
        if self.merged is not None:
            return 0
        copy = self.fuse(dequantize=True)
        added = [array for name, array in copy.items() if array is not self.linear.get(name)]
        mx.eval(added)
        # Not through nn.Module's own setter: a child would be saved and trained.
        object.__setattr__(self, "merged", copy)
        self.frozen_before = set(self._no_grad)
        self.freeze(recurse=False)
        return sum(array.nbytes for array in added)

    def unmerge(self) -> None:
        """Drop the fused copy and run base and update separately again."""
        if self.merged is not None:
            self.merged = None
            self._no_grad = self.frozen_before


class LoRALinear(LoRALayer):
    """A frozen `nn.Linear` or `nn.QuantizedLinear` with a trained low-rank update.

    A is drawn uniformly from +-1 / sqrt(input_dims) and B is zero, so an untrained layer returns
    exactly what its base returns. A and B are float32 whatever the precision of the base; the
    output has the base's dtype.

    Args:
        linear: the layer to adapt; it is frozen, not copied.
        rank: number of columns of A and of rows of B.
        alpha: numerator of the scale.
        method: name of the method, as adapter files record it.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        dropout: probability of zeroing an input of A during training.
        key: random key for A; by default MLX's global state.
    """

    kind = "linear"

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        *,
        alpha: float = 16.0,
        method: str = "lora",
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        key: mx.array | None = None,
    ) -> None:
        super().__init__(linear, rank, alpha=alpha, method=method, rank_stabilized=rank_stabilized)
        input_dims, output_dims = linear_dims(linear)
        bound = 1 / math.sqrt(input_dims)
        self.dropout = nn.Dropout(p=dropout)
        self.lora_a = mx.random.uniform(-bound, bound, shape=(input_dims, rank), key=key)
        self.lora_b = mx.zeros((rank, output_dims))

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int = 8, **settings: Any) -> "LoRALinear":
        """Adapt `linear`; `settings` are the constructor's keyword arguments."""
        return cls(linear, rank, **settings)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., input_dims) to (..., output_dims)."""
        if self.merged is not None:
            return self.merged(x)
        y = self.linear(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return y + (self.scale * z).astype(y.dtype)

    def deltas(self) -> dict[str, mx.array]:
        """The change of the weight, scale * (A B)^T: (output_dims, input_dims), float32."""
        return {"weight": self.scale * (self.lora_a @ self.lora_b).T}

    def tensors(self) -> dict[str, mx.array]:
        """A and B by name."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b}


def linear_dims(linear: nn.Module) -> tuple[int, int]:
    """(input_dims, output_dims) of an `nn.Linear` or `nn.QuantizedLinear`."""
    output_dims, input_dims = weight_shape(linear)
    return input_dims, output_dims


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight, before quantization if it is quantized."""
    *rows, columns = module.weight.shape
    # Each 32-bit column holds 32 / bits inputs; values of 3, 5 and 6 bits straddle columns, so
    # multiply first.
    return (*rows, columns * 32 // module.bits if is_quantized(module) else columns)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is quantized."""
    return "scales" in module


def dense_weight(module: nn.Module) -> mx.array:
    """A module's weight, dequantized if necessary: (output_dims, input_dims) of a linear layer."""
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
    """A copy of a layer with some arrays replaced, or removed if `None`; the others are shared."""
    copy: nn.Module = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._no_grad = set(module._no_grad)
    dict.update(copy, module)
    for name, array in arrays.items():
        if array is None:
            copy.pop(name, None)
        else:
            copy[name] = array
    return copy


def dense_layer(module: nn.Module) -> nn.Module:
    """The layer itself, or an unquantized layer with the dequantized weight.

    The unquantized type is the one named without `Quantized`, as in MLX and mlx-lm.

    Raises:
        TypeError: there is no such type.
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
    """A layer like `base` with `deltas` added to its parameters; all other arrays are shared.

    A quantized base is quantized again with its own settings, which rounds the sum;
    `dequantize` returns an unquantized layer instead, 16 / bits as large in half precision.
    """
    dense = dense_layer(base) if "weight" in deltas else base
    sums = {
        name: (dense[name].astype(mx.float32) + delta).astype(dense[name].dtype)
        for name, delta in deltas.items()
    }
    if dequantize or dense is base:
        return with_arrays(dense, sums)
    return with_arrays(base, sums | _quantized_as(base, sums["weight"]))


def _dense_type(quantized: type) -> type:
    """The unquantized counterpart of a quantized layer's type."""
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
