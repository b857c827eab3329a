"""Writes a model with its adapter inside, a layer at a time.

A layer of the base is read, changed, quantized and written before the next, so that memory stays
near one layer. Knows nothing of how well the result does.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.attach import lora_layers
from graft.adapters.layer_config import config_of, resolve_kind
from graft.adapters.layer_kinds import EMBEDDING_COLUMNS, EMBEDDING_INPUT
from graft.adapters.methods import make_layer
from graft.adapters.rotary import to_halves
from graft.errors import InputError
from graft.models import dense_layer, is_quantized, with_arrays
from graft.pretrained.architectures import INTERLEAVED
from graft.pretrained.base_config import BaseConfig
from graft.pretrained.companions import copy_companions
from graft.pretrained.folder import EMBEDDED_MODEL, find_folder
from graft.pretrained.lazy_model import BaseFiles, open_base
from graft.quantization.choose import UNQUANTIZED, Quantization, can_quantize, settings_like
from graft.storage.lazy_tensors import Output, read, size_bytes, without_buffer_cache
from graft.storage.safetensors import load_safetensors, write_safetensors

import mlx.core as mx
import mlx.nn as nn

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Fusion:
    """What is to be fused, and how.

    Attributes:
        model: folder or Hub name; `None` is the embedded model.
        adapter: to be folded in.
        dequantize: write whole weights.
        q_bits: bits of every quantized layer; `None` keeps the base's.
        more_bits: bits of single layers by path, `UNQUANTIZED` for none.
        prepared: files with the quantized arrays of single layers, by path.
        name: of the adapter, for messages.
    """

    model: str | None
    adapter: Adapter
    dequantize: bool = False
    q_bits: int | None = None
    more_bits: Mapping[str, int] = field(default_factory=dict)
    prepared: Mapping[str, Path] = field(default_factory=dict)
    name: str = "the adapter"


def write_fused_model(fusion: Fusion, folder: Path) -> tuple[int, int]:
    """Write the fused model into an existing folder.

    Returns:
        Bytes of the base's weights, and of the fused ones.

    Raises:
        InputError: the adapter does not fit the model, or files are at fault.
    """
    place = EMBEDDED_MODEL if fusion.model is None else find_folder(fusion.model)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(open_base(place, scratch))
        apply_adapter(base.model, fusion.adapter, name=fusion.name)
        _refuse_input_embeddings(base)
        before = sum(size_bytes(t) for t in base.tensors.values())
        stack.enter_context(without_buffer_cache())
        config, outputs = _plan(fusion, base)
        write_safetensors(folder / WEIGHTS, outputs)
        copy_companions(place, folder)
        _save_config(config, folder)
    return before, sum(output.size_bytes for output in outputs)


def _plan(fusion: Fusion, base: BaseFiles) -> tuple[dict[str, Any], list[Output]]:
    """The configuration of the fused model, and its tensors, made when they are written."""
    facts = BaseConfig(fusion.model, base.config)
    halves = fusion.dequantize and facts.rotary == INTERLEAVED
    config = dict(base.config)
    layers = dict(base.model.named_modules())
    adapted = dict(lora_layers(base.model))
    quantized: dict[str, Quantization] = {}
    outputs: list[Output] = []
    for path in _modules_in_order(base):
        layer = adapted.get(path)
        module = layer.base if layer is not None else layers[path]
        target = _target(fusion, path, module)
        if target is not None:
            quantized[path] = target
        heads = facts.heads(path) if halves else None
        prepared = fusion.prepared.get(path)
        outputs += _Layer(base, path, module, layer, target, heads, prepared).outputs()
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    if halves:
        config.pop("rope_traditional", None)
    if quantized:
        config["quantization"] = _quantization(quantized, layers, adapted)
    return config, outputs


def _quantization(
    quantized: Mapping[str, Quantization], layers: Mapping[str, Any], adapted: Mapping[str, Any]
) -> Quantization:
    """mlx-lm's record: the most frequent settings, and by path what differs."""
    counts = Counter(tuple(settings.items()) for settings in quantized.values())
    common = dict(counts.most_common(1)[0][0])
    differing = {path: s for path, s in quantized.items() if s != common}
    for path, module in layers.items():
        base = adapted[path].base if path in adapted else module
        inside = any(path.startswith(f"{other}.") for other in adapted)
        if hasattr(base, "to_quantized") and path not in quantized and not inside:
            differing[path] = False  # type: ignore[assignment]
    return common | differing


def _target(fusion: Fusion, path: str, module: nn.Module) -> Quantization | None:
    """How a layer is quantized in the fused model; `None` for whole."""
    if fusion.dequantize:
        return None
    bits = fusion.more_bits.get(path, fusion.q_bits)
    if bits == UNQUANTIZED:
        return None
    if is_quantized(module):
        return settings_like(module, bits)
    return settings_like(module, bits) if fusion.q_bits and can_quantize(module) else None


def _modules_in_order(base: BaseFiles) -> list[str]:
    """Paths of the modules that have tensors, each once, in the file's order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in base.tensors))


@dataclass
class _Layer:
    """One module of the base on its way into the fused model; its arrays live while it is written.

    Attributes:
        base: where it comes from.
        path: its path.
        module: the architecture's, with placeholders for arrays.
        adapted: the LoRA layer over it, if there is one.
        target: how to quantize it.
        heads: of q and k whose rows go from interleaved to halves.
        prepared: a file with the quantized weight, scales and biases.
    """

    base: BaseFiles
    path: str
    module: nn.Module
    adapted: Any
    target: Quantization | None
    heads: int | None
    prepared: Path | None

    def outputs(self) -> list[Output]:
        """The tensors to write; the first that is asked for makes them all."""
        names = [n for n in self.base.tensors if n.rpartition(".")[0] == self.path]
        kept: dict[str, mx.array] = {}

        def blocks(name: str, *, first: bool) -> Iterator[mx.array]:
            if first:
                made = self._made(self._read(names))
                if self.prepared is not None:
                    # A model in memory may have another precision than its files.
                    prepared = load_safetensors(self.prepared)
                    made |= {n: a.astype(made[n].dtype) for n, a in prepared.items()}
                mx.eval(list(made.values()))
                kept.update(made)
            yield kept.pop(name)

        placeholders = {n: self._placeholder(n) for n in names}
        shapes = {n: (a.dtype, tuple(a.shape)) for n, a in self._made(placeholders).items()}
        return [
            Output(f"{self.path}.{name}" if self.path else name, *shape, blocks(name, first=not i))
            for i, (name, shape) in enumerate(shapes.items())
        ]

    def _read(self, names: Sequence[str]) -> dict[str, mx.array]:
        return {name: read(self.base.tensors[name]) for name in names}

    def _placeholder(self, name: str) -> mx.array:
        tensor = self.base.tensors[name]
        return mx.zeros(tensor.shape, tensor.dtype)

    def _made(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """From the base's arrays, by their full names, to the fused ones by their own names."""
        own = {name.rpartition(".")[2]: array for name, array in arrays.items()}
        module = with_arrays(self.module, own)
        if self.adapted is not None:
            module = _over(module, self.adapted).fuse(dequantize=True)
        elif not _stays(self.module, self.target):
            module = dense_layer(module)
        found = {name: module[name] for name in (*own, "weight") if name in module}
        if self.heads is not None:
            found = {n: to_halves(a.T, self.heads).T for n, a in found.items()}
        if self.target is not None and not is_quantized(module):
            packed = mx.quantize(found.pop("weight"), **self.target)
            found |= dict(zip(("weight", "scales", "biases"), packed, strict=False))
        return found


def _stays(module: nn.Module, target: Quantization | None) -> bool:
    """Whether a layer that is not adapted stays quantized as it is."""
    return is_quantized(module) and target == settings_like(module, None)


def _over(base: nn.Module, layer: Any) -> Any:
    """The adapter of a layer over the same base with other arrays.

    Made anew, since some methods keep numbers of the base's weight.
    """
    setting = config_of(layer)
    kind = resolve_kind(base, setting)
    assert kind is not None
    twin: Any = make_layer(
        base, setting.rank, kind=kind, method=setting.method, alpha=setting.alpha
    )
    twin.load(layer.tensors())
    return twin


def _refuse_input_embeddings(base: BaseFiles) -> None:
    tied = BaseConfig(None, base.config).tied
    inputs = (EMBEDDING_INPUT.name, EMBEDDING_COLUMNS.name)
    paths = [path for path, layer in lora_layers(base.model) if layer.kind in inputs]
    if tied and paths:
        raise InputError(
            f"{paths[0]} is adapted at the input alone and tied to the output: one weight cannot "
            "be both; use the adapter as it is"
        )


def _save_config(config: Mapping[str, Any], folder: Path) -> None:
    from mlx_lm.utils import save_config

    save_config(dict(config), folder / "config.json")


def quantized_bits(fusion: Fusion, model: nn.Module) -> dict[str, int]:
    """Bits of the layers that are quantized anew in the fused model."""
    adapted = dict(lora_layers(model))
    found = {}
    for path, module in model.named_modules():
        base = adapted[path].base if path in adapted else module
        target = _target(fusion, path, base)
        inside = any(path.startswith(f"{other}.") for other in adapted)
        if target is None or inside or (path not in adapted and _stays(base, target)):
            continue
        found[path] = int(target["bits"])
    return found
