"""The adapted layer for every kind of layer and every method.

`models.LoRALinear` is the plain case; read it first. Here the layer's kind
(`graft.adapters.layer_kinds`) defines what A and B mean for the layer, and the method's formula
(`graft.adapters.methods`) what is trained and how it changes the output.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.adapters.layer_kinds import LayerKind
from graft.models import LoRALayer, dense_weight

import mlx.core as mx
import mlx.nn as nn

FactorPair = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class MethodFormula:
    """How a method changes a layer.

    Attributes:
        parameters: (layer, key) -> its arrays by name. MLX treats those whose names begin with an
            underscore as constants: they are neither trained nor saved.
        output: (layer, x, *inputs) -> the adapted layer's output.
        deltas: layer -> the changes of the base's parameters, by name.
        as_linear: (layer, x) -> the output of an embedding that the output projection is tied to.
        linear_layer: (base, rank, **settings) -> a layer written for linear bases alone, to use
            there instead of `AdaptedLayer`.
    """

    parameters: Callable[["AdaptedLayer", mx.array | None], dict[str, mx.array]]
    output: Callable[..., mx.array]
    deltas: Callable[["AdaptedLayer"], dict[str, mx.array]]
    as_linear: Callable[["AdaptedLayer", mx.array], mx.array] | None = None
    linear_layer: Callable[..., LoRALayer] | None = None


class AdaptedLayer(LoRALayer):
    """A frozen layer of any kind with an update by any method.

    What is trained is float32 whatever the precision of the base, and starts at values for which
    the layer returns what its base returns, bit for bit. The base is held under `linear`, whatever
    its kind, and never written to.

    Args:
        base: the layer to adapt; it is frozen, not copied.
        rank: rank of the update; 1 if it has none.
        kind: kind of the base.
        method: name of the method, as adapter files record it.
        formula: what the method trains and computes.
        alpha: numerator of the scale.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        dropout: probability of zeroing an input of A during training; without effect if A has no
            such input: ids, vectors, merge-first, (IA)3.
        key: random key; by default MLX's global state.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        kind: LayerKind,
        method: str,
        formula: MethodFormula,
        alpha: float = 16.0,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        key: mx.array | None = None,
    ) -> None:
        super().__init__(base, rank, alpha=alpha, method=method, rank_stabilized=rank_stabilized)
        self.kind = kind.name
        self.layer_kind = kind
        self.formula = formula
        self.dropout = nn.Dropout(p=dropout)
        for name, array in formula.parameters(self, key).items():
            self[name] = array

    def _extra_repr(self) -> str:
        return f"kind={self.kind}, method={self.method}, rank={self.rank}, alpha={self.alpha:g}"

    def __call__(self, x: mx.array, *inputs: Any, **settings: Any) -> Any:
        """The base's output for the same inputs, adapted."""
        if self.merged is not None:
            return self.merged(x, *inputs, **settings)
        return self.formula.output(self, x, *inputs, **settings)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection tied to an embedding: (..., dims) to (..., vocabulary)."""
        if self.layer_kind.input_alone:
            return self.linear.as_linear(x)
        if self.merged is not None:
            return self.merged.as_linear(x)
        assert self.formula.as_linear is not None
        return self.formula.as_linear(self, x)

    def dropped(self, x: mx.array) -> mx.array:
        """The input of A after dropout; ids are returned as they are."""
        return self.dropout(x) if mx.issubdtype(x.dtype, mx.floating) else x

    def deltas(self) -> dict[str, mx.array]:
        """The changes of the base's parameters, by parameter name, float32."""
        return self.formula.deltas(self)

    def tensors(self) -> dict[str, mx.array]:
        """The tensors that an adapter file stores for this layer, by name.

        If the layer keeps its initial A0 and B0, they are [A, A0] and [B; -B0]: a plain LoRA of
        twice the rank, which any reader of LoRA can add to the unchanged base.
        """
        if "_start_a" not in self:
            arrays = ((n, a) for n, a in self.items() if isinstance(a, mx.array))
            return {name: array for name, array in arrays if not name.startswith("_")}
        return {
            "lora_a": mx.concatenate([self.lora_a, self._start_a], axis=-1),
            "lora_b": mx.concatenate([self.lora_b, -self._start_b], axis=0),
        }

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Set the tensors that `tensors` returns; a merged layer is unmerged first."""
        if "_start_a" not in self:
            super().load(tensors)
            return
        self.unmerge()
        self.lora_a, self._start_a = mx.split(tensors["lora_a"], 2, axis=-1)
        self.lora_b, negative = mx.split(tensors["lora_b"], 2, axis=0)
        self._start_b = -negative


def whole_weight(layer: AdaptedLayer) -> mx.array:
    """The weight of a layer's base, float32."""
    return dense_weight(layer.linear).astype(mx.float32)
