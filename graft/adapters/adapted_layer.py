"""An adapted layer of any kind by any method.

`models.LoRALinear` is the plain case, to be read first. Here the kind
(`graft.adapters.layer_kinds`) tells what A
and B mean for the layer, and the method (`graft.adapters.methods`) what is trained and how it
enters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.adapters.layer_kinds import LayerKind
from graft.models import LoRALayer, dense_weight

import mlx.core as mx
import mlx.nn as nn

Factors = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class MethodFormula:
    """How a method changes a layer.

    Attributes:
        parameters: (layer, key) -> its arrays by name. MLX takes those whose names begin with an
            underscore for constants: they are neither trained nor saved.
        output: (layer, x, *inputs) -> what the layer gives.
        deltas: layer -> the changes of the base's parameters, by name.
        as_linear: (layer, x) -> what an embedding gives that the output is tied to.
    """

    parameters: Callable[["AdaptedLayer", mx.array | None], dict[str, mx.array]]
    output: Callable[..., mx.array]
    deltas: Callable[["AdaptedLayer"], dict[str, mx.array]]
    as_linear: Callable[["AdaptedLayer", mx.array], mx.array] | None = None


class AdaptedLayer(LoRALayer):
    """A frozen layer with something trained beside it.

    What is trained is float32 whatever the base is made of, and so set at the start that the layer
    gives what its base gives, bit for bit. The base is held under `linear`, whatever its kind;
    nothing is ever written to it.

    Args:
        base: the layer to adapt; it is frozen, and not copied.
        rank: of the update; 1 where there is none.
        kind: of the base.
        method: the name that records have.
        formula: what the method does.
        alpha: numerator of the scale.
        rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        dropout: probability of zeroing an input of A while training; without effect where A has
            none: ids, vectors, merge-first, (IA)3.
        key: randomness; MLX's global state by default.
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
        self.form = kind
        self.formula = formula
        self.dropout = nn.Dropout(p=dropout)
        for name, array in formula.parameters(self, key).items():
            self[name] = array

    def _extra_repr(self) -> str:
        return f"kind={self.kind}, method={self.method}, rank={self.rank}, alpha={self.alpha:g}"

    def __call__(self, x: mx.array, *others: Any, **settings: Any) -> Any:
        """What the base gives for the same inputs, adapted."""
        if self.merged is not None:
            return self.merged(x, *others, **settings)
        return self.formula.output(self, x, *others, **settings)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection that an embedding is tied to: (..., dims) to (..., vocabulary)."""
        if self.form.input_alone:
            return self.linear.as_linear(x)
        if self.merged is not None:
            return self.merged.as_linear(x)
        assert self.formula.as_linear is not None
        return self.formula.as_linear(self, x)

    def dropped(self, x: mx.array) -> mx.array:
        """The input of A, with dropout unless it is made of ids."""
        return self.dropout(x) if mx.issubdtype(x.dtype, mx.floating) else x

    def deltas(self) -> dict[str, mx.array]:
        """The changes of the base's parameters, by name, float32."""
        return self.formula.deltas(self)

    def tensors(self) -> dict[str, mx.array]:
        """What is trained, by name; A and B with their start beside them where there is one.

        [A, A0] and [B; -B0] are a plain LoRA of twice the rank, which any reader of LoRA can add to
        the base as it was.
        """
        own = {n: a for n, a in self.items() if isinstance(a, mx.array) and not n.startswith("_")}
        if "_start_a" not in self:
            return own
        return {
            "lora_a": mx.concatenate([self.lora_a, self._start_a], axis=-1),
            "lora_b": mx.concatenate([self.lora_b, -self._start_b], axis=0),
        }

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Take what `tensors` gave; a merged layer runs base and update apart again."""
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
