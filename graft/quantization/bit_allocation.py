"""Allocates bits to layers until a quantized model is close enough to the model before rounding.

The first measure is GPTQ (`graft.quantization.gptq`), which rounds better at the same size. If that
is not enough, layers get more bits, first where these reduce the divergence most per byte.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graft.adapters.attach import lora_layers
from graft.adapters.layer_kinds import LINEAR, kind_of
from graft.data.collate import Batch
from graft.models import LoRALayer, dense_layer, weight_shape, with_arrays
from graft.quantization.choose import BITS, UNQUANTIZED, settings_like
from graft.quantization.divergence import Comparison, Sample, compare
from graft.quantization.gptq import grams, quantize_for
from graft.storage.safetensors import load_safetensors

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# The divergence of each layer is measured on one of every `SHARE` batches.
SHARE = 4


@dataclass(frozen=True)
class BitAllocation:
    """The layers of a fused model that differ from plain rounding at its default bits.

    Attributes:
        more_bits: from path to bits; `UNQUANTIZED` leaves a layer unquantized.
        prepared: from path to a file with the layer's quantized arrays.
    """

    more_bits: Mapping[str, int] = field(default_factory=dict)
    prepared: Mapping[str, Path] = field(default_factory=dict)


class BitAllocator:
    """Iterates over allocations, each chosen by how far the last one was from the adapter.

    Args:
        model: the base model with the adapter attached; it is restored after each step.
        bits: from the path of each layer that fusing quantizes to its bits.
        sample: the adapter's outputs on sample text, to measure against.
        calibration: other text, for the inputs of the layers.
        scratch: a folder for quantized layers.
        limit: the largest acceptable divergence, in nats per token.
        room_bytes: the number of bytes that the model may grow by.

    Attributes:
        comparison: how the model with the last allocation compares with the adapter. Set it before
            asking for the first allocation, and after each one.
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
        self.comparison: Comparison | None = None

    def __iter__(self) -> Iterator[BitAllocation]:
        """Yield allocations until the comparison is within the limit or no layer can improve."""
        if not self.bits or self._kl() <= self.limit:
            return
        prepared = self.prepare(self.bits)
        yield BitAllocation(prepared=prepared)
        if self._kl() > self.limit:
            yield from self._with_more_bits(prepared)

    def _with_more_bits(self, prepared: Mapping[str, Path]) -> Iterator[BitAllocation]:
        twins = ((p, self.twin(p, bits, prepared.get(p))) for p, bits in self.bits.items())
        divergences = layer_divergences(self.sample.part(SHARE), self.model, twins)
        sizes = {path: math.prod(weight_shape(_base(self.layers[path]))) for path in self.bits}
        # Errors partly cancel or add up, so their sum differs from the measured divergence.
        budget = self.limit * min(1.0, sum(divergences.values()) / self._kl())
        choose = partial(choose_bits, divergences, sizes, self.bits, room_bytes=self.room_bytes)
        chosen, maximum = dict(self.bits), choose(budget=0.0)
        allocation = BitAllocation(prepared=prepared)
        while chosen != maximum:
            previous, chosen = chosen, choose(budget=budget)
            if chosen == previous:
                budget /= 2
                continue
            allocation = self._raised(allocation, chosen)
            yield allocation
            if self._kl() <= self.limit:
                return
            budget *= 0.9 * self.limit / self._kl()

    def _raised(self, allocation: BitAllocation, chosen: Mapping[str, int]) -> BitAllocation:
        """The next allocation; only layers whose bits have changed are quantized again."""
        more = {path: bits for path, bits in chosen.items() if bits != self.bits[path]}
        changed = {
            p: b for p, b in more.items() if b not in (allocation.more_bits.get(p), UNQUANTIZED)
        }
        kept = {p: file for p, file in allocation.prepared.items() if more.get(p) != UNQUANTIZED}
        return BitAllocation(more, kept | self.prepare(changed))

    def _kl(self) -> float:
        assert self.comparison is not None
        return self.comparison.kl

    def prepare(self, bits: Mapping[str, int]) -> dict[str, Path]:
        """Quantize linear layers with GPTQ; returns the file of each. Other kinds are left out."""
        inputs = {
            path: weight_shape(base)[1]
            for path, base in ((path, _base(self.layers[path])) for path in bits)
            if kind_of(base) is LINEAR and settings_like(base, bits[path])["mode"] == "affine"
        }
        files = {}
        for path, gram in grams(self.model, self.calibration, inputs):
            layer = self.layers[path]
            settings = settings_like(_base(layer), bits[path])
            size = settings["group_size"]
            weight = _whole(layer).weight
            arrays = quantize_for(weight, gram, group_size=size, bits=settings["bits"])
            files[path] = self.scratch / f"{path}-{bits[path]}.safetensors"
            mx.save_safetensors(str(files[path]), arrays)
        return files

    def twin(self, path: str, bits: int, file: Path | None) -> nn.Module:
        """A layer with its adapter fused, quantized; from its file if it has one."""
        layer = self.layers[path]
        twin: nn.Module = _whole(layer).to_quantized(**settings_like(_base(layer), bits))
        return twin if file is None else with_arrays(twin, load_safetensors(file))


def _base(layer: Any) -> nn.Module:
    """The layer under the adapter, or the layer itself if it has none."""
    return layer.base if isinstance(layer, LoRALayer) else layer


def _whole(layer: Any) -> Any:
    """The unquantized layer, with its adapter fused if it has one."""
    return layer.fuse(dequantize=True) if isinstance(layer, LoRALayer) else dense_layer(layer)


def layer_divergences(
    sample: Sample, model: nn.Module, twins: Iterable[tuple[str, nn.Module]]
) -> dict[str, float]:
    """The divergence that each layer alone causes when it is replaced by its quantized twin.

    Args:
        sample: the outputs of `model`.
        model: the model with the adapter; it is restored.
        twins: pairs of a path and the replacement for that layer, made one at a time.
    """
    divergences = {}
    for path, twin in twins:
        layer = dict(model.named_modules())[path]
        model.update_modules(tree_unflatten([(path, twin)]))
        divergences[path] = max(compare(sample, model).kl, 0.0)
        model.update_modules(tree_unflatten([(path, layer)]))
    return divergences


def choose_bits(
    divergences: Mapping[str, float],
    sizes: Mapping[str, int],
    bits: Mapping[str, int],
    *,
    budget: float,
    room_bytes: float = math.inf,
) -> dict[str, int]:
    """Raise the bits of layers greedily until the sum of their divergences is within a budget.

    The rounding errors of different layers are nearly independent, so their divergences add up, and
    each further bit divides a layer's divergence by 4. The next bits therefore go to the layer
    where they reduce the divergence most per byte.

    Args:
        divergences: the divergence that each layer alone causes at its current bits.
        sizes: the number of weights of each layer.
        bits: the current bits of each layer.
        budget: the largest acceptable sum of divergences.
        room_bytes: the number of bytes that the model may grow by.
    """
    chosen, remaining = dict(bits), dict(divergences)
    while sum(remaining.values()) > budget:
        after = {
            path: next_bits(chosen[path])
            for path in remaining
            if chosen[path] < UNQUANTIZED
            and remaining[path] > 0
            and _bytes(chosen[path], next_bits(chosen[path]), sizes[path]) <= room_bytes
        }
        if not after:
            break

        def gain(path: str, after: Mapping[str, int] = after) -> float:
            more = after[path] - chosen[path]
            return remaining[path] * (1 - 4.0**-more) / (more * sizes[path])

        best = max(after, key=gain)
        room_bytes -= _bytes(chosen[best], after[best], sizes[best])
        rounds = after[best] != UNQUANTIZED
        remaining[best] *= 4.0 ** (chosen[best] - after[best]) if rounds else 0.0
        chosen[best] = after[best]
    return chosen


def _bytes(before: int, after: int, weights: int) -> float:
    return (after - before) * weights / 8


def next_bits(bits: int) -> int:
    """The next higher number of bits that MLX supports, or `UNQUANTIZED`."""
    return next((more for more in BITS if more > bits), UNQUANTIZED)
