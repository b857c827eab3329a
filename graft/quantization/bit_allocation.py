"""What is done for layers that lose the adapter when they are rounded: care, then more bits.

Care is rounding with regard to a layer's inputs (`graft.quantization.gptq`), which costs no bits.
More bits go first where they save most divergence a byte.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graft.adapters.attach import lora_layers
from graft.adapters.layer_kinds import LINEAR, kind_of
from graft.data.batches import Batch
from graft.models import LoRALayer, dense_layer, weight_shape, with_arrays
from graft.quantization.choose import BITS, WHOLE, settings_like
from graft.quantization.divergence import Comparison, Sample, compare
from graft.quantization.gptq import grams, quantize_for
from graft.storage.safetensors import load_safetensors

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# Each layer's part in the divergence is measured on one batch of so many.
SHARE = 4


@dataclass(frozen=True)
class BitAllocation:
    """How single layers of a fused model are quantized, where they are not quantized plainly.

    Attributes:
        more_bits: bits of layers by path, `WHOLE` for none.
        prepared: files with the quantized arrays of layers, by path.
    """

    more_bits: Mapping[str, int] = field(default_factory=dict)
    prepared: Mapping[str, Path] = field(default_factory=dict)


class BitAllocator:
    """Better and better allocations for one adapter, an iterator; each is better by what was seen.

    Args:
        model: with the adapter; it is as before after each step.
        bits: of the layers that are quantized anew.
        sample: of the adapter, to measure by.
        calibration: other text, to take the layers' inputs from.
        scratch: a folder for quantized layers.
        limit: the divergence aimed at, in nats a token.
        room_bytes: by how much the model may grow.

    Attributes:
        seen: the comparison of the last model written, to be set before the next is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: Mapping[str, int],
        *,
        sample: Sample,
        calibration: Sequence[Batch],
        scratch: Path,
        limit: float,
        room_bytes: float,
    ) -> None:
        self.model = model
        adapted = dict(lora_layers(model))
        modules = dict(model.named_modules())
        self.layers = {path: adapted.get(path, modules[path]) for path in bits}
        self.bits = bits
        self.sample = sample
        self.calibration = calibration
        self.scratch = scratch
        self.limit = limit
        self.room_bytes = room_bytes
        self.seen: Comparison | None = None

    def __iter__(self) -> Iterator[BitAllocation]:
        """Yield allocations until the last one seen is within the limit, or nothing more helps."""
        if not self.bits or self._kl() <= self.limit:
            return
        prepared = self.prepare(self.bits)
        yield BitAllocation(prepared=prepared)
        if self._kl() <= self.limit:
            return
        twins = ((p, self.twin(p, bits, prepared.get(p))) for p, bits in self.bits.items())
        divergences = layer_divergences(self.sample.part(SHARE), self.model, twins)
        sizes = {path: math.prod(weight_shape(_base(self.layers[path]))) for path in self.bits}
        # What the sum predicts and what is seen differ by the way errors meet.
        budget = self.limit * min(1.0, sum(divergences.values()) / self._kl())
        choose = partial(choose_bits, divergences, sizes, self.bits, room_bytes=self.room_bytes)
        chosen, most = dict(self.bits), choose(budget=0.0)
        more: dict[str, int] = {}
        while chosen != most:
            before, chosen = chosen, choose(budget=budget)
            if chosen == before:
                budget /= 2
                continue
            now = {path: bits for path, bits in chosen.items() if bits != self.bits[path]}
            changed = {p: bits for p, bits in now.items() if bits != more.get(p)}
            more = now
            prepared = {p: f for p, f in prepared.items() if more.get(p) != WHOLE}
            prepared |= self.prepare({p: bits for p, bits in changed.items() if bits != WHOLE})
            yield BitAllocation(more, prepared)
            if self._kl() <= self.limit:
                return
            budget *= 0.9 * self.limit / self._kl()

    def _kl(self) -> float:
        assert self.seen is not None
        return self.seen.kl

    def prepare(self, bits: Mapping[str, int]) -> dict[str, Path]:
        """Quantize linear layers with regard to their inputs, each into a file; others wait."""
        inputs = {
            path: weight_shape(base)[1]
            for path, base in ((path, _base(self.layers[path])) for path in bits)
            if kind_of(base) is LINEAR and settings_like(base, bits[path])["mode"] == "affine"
        }
        found = {}
        for path, gram in grams(self.model, self.calibration, inputs):
            layer = self.layers[path]
            settings = settings_like(_base(layer), bits[path])
            size = settings["group_size"]
            weight = _whole(layer).weight
            arrays = quantize_for(weight, gram, group_size=size, bits=settings["bits"])
            found[path] = self.scratch / f"{path}-{bits[path]}.safetensors"
            mx.save_safetensors(str(found[path]), arrays)
        return found

    def twin(self, path: str, bits: int, file: Path | None) -> nn.Module:
        """A layer fused and quantized, from its file if there is one."""
        layer = self.layers[path]
        twin: nn.Module = _whole(layer).to_quantized(**settings_like(_base(layer), bits))
        return twin if file is None else with_arrays(twin, load_safetensors(file))


def _base(layer: Any) -> nn.Module:
    """The layer under the adapter, or the layer itself where there is none."""
    return layer.base if isinstance(layer, LoRALayer) else layer


def _whole(layer: Any) -> Any:
    """The layer with its adapter inside, if it has one, and without any rounding."""
    return layer.fuse(dequantize=True) if isinstance(layer, LoRALayer) else dense_layer(layer)


def layer_divergences(
    sample: Sample, model: nn.Module, twins: Iterable[tuple[str, nn.Module]]
) -> dict[str, float]:
    """The divergence that each layer's twin causes alone, in place of the layer.

    Args:
        sample: of `model`.
        model: with the adapter; it is as before when this returns.
        twins: from path to the layer that stands in, made one at a time.
    """
    found = {}
    for path, twin in twins:
        layer = dict(model.named_modules())[path]
        model.update_modules(tree_unflatten([(path, twin)]))
        found[path] = max(compare(sample, model).kl, 0.0)
        model.update_modules(tree_unflatten([(path, layer)]))
    return found


def choose_bits(
    divergences: Mapping[str, float],
    sizes: Mapping[str, int],
    bits: Mapping[str, int],
    *,
    budget: float,
    room_bytes: float = math.inf,
) -> dict[str, int]:
    """More bits where they do most, until the sum of the divergences is within a budget.

    Rounding errors of different layers add up nearly independently, and each bit more divides the
    divergence by 4. So the next bits go to the layer where they save most divergence a byte.

    Args:
        divergences: what each layer causes alone at its present bits.
        sizes: weights of each layer.
        bits: the present ones.
        budget: for the sum.
        room_bytes: by how much the model may grow.
    """
    chosen, left = dict(bits), dict(divergences)
    while sum(left.values()) > budget:
        after = {
            path: next_bits(chosen[path])
            for path in left
            if chosen[path] < WHOLE
            and left[path] > 0
            and _bytes(chosen[path], next_bits(chosen[path]), sizes[path]) <= room_bytes
        }
        if not after:
            break

        def gain(path: str, after: Mapping[str, int] = after) -> float:
            more = after[path] - chosen[path]
            return left[path] * (1 - 4.0**-more) / (more * sizes[path])

        best = max(after, key=gain)
        room_bytes -= _bytes(chosen[best], after[best], sizes[best])
        left[best] *= 0.0 if after[best] == WHOLE else 4.0 ** (chosen[best] - after[best])
        chosen[best] = after[best]
    return chosen


def _bytes(before: int, after: int, weights: int) -> float:
    return (after - before) * weights / 8


def next_bits(bits: int) -> int:
    """The next number of bits that MLX can quantize to, or `WHOLE`."""
    return next((more for more in BITS if more > bits), WHOLE)
