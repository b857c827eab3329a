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
from graft.models import dense_weight, fused, merge, scale_of, unmerge

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


class AdaptedLayer(nn.Module):
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
        dropout: float = 0.0,
        key: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.kind = kind.name
        self.method = method
        self.form = kind
        self.formula = formula
        self.linear = base
        self.linear.freeze()
        self.merged: nn.Module | None = None
        self.dropout = nn.Dropout(p=dropout)
        for name, array in formula.parameters(self, key).items():
            self[name] = array

    def _extra_repr(self) -> str:
        return f"kind={self.kind}, method={self.method}, rank={self.rank}, alpha={self.alpha:g}"

    @property
    def scale(self) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return scale_of(self.method, self.rank, self.alpha)

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.linear

    @property
    def weight(self) -> mx.array:
        """The adapted weight, for modules that read it instead of calling the layer."""
        return (self.merged or self.fuse(dequantize=True)).weight

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

    def delta(self) -> mx.array:
        """The change of the base's weight, or of the bias where that alone is trained, float32."""
        return next(iter(self.deltas().values()))

    def deltas(self) -> dict[str, mx.array]:
        """The changes of the base's parameters, by name, float32."""
        return self.formula.deltas(self)

    def fuse(self, *, dequantize: bool = False) -> nn.Module:
        """A layer like the base with the changes in it.

        A quantized base is quantized again, which rounds the sum, unless `dequantize` asks for the
        whole weight.
        """
        return fused(self.linear, self.deltas(), dequantize=dequantize)

    def merge(self) -> int:
        """Run the folded layer from here on; returns the bytes that are held for it.

        Over a quantized base that is a whole weight beside the packed one.
        """
        return merge(self)

    def unmerge(self) -> None:
        """Run base and update apart again, the base bit for bit as ever."""
        unmerge(self)

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
        self.unmerge()
        if "_start_a" not in self:
            self.update(dict(tensors))
            return
        self.lora_a, self._start_a = mx.split(tensors["lora_a"], 2, axis=-1)
        self.lora_b, negative = mx.split(tensors["lora_b"], 2, axis=0)
        self._start_b = -negative


def whole_weight(layer: AdaptedLayer) -> mx.array:
    """The weight of a layer's base, float32."""
    return dense_weight(layer.linear).astype(mx.float32)
