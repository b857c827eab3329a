"""Writes a base model with an adapter fused into it, one layer at a time.

Each layer of the base model is read, fused, quantized and written before the next one, so peak
memory stays near the size of one layer. Knows nothing about the quality of the result.
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
from graft.pretrained.base_config import head_count, is_tied, rotary_order
from graft.pretrained.companions import copy_companions
from graft.pretrained.folder import EMBEDDED_MODEL, find_folder
from graft.pretrained.lazy_model import BaseFiles, open_base
from graft.pretrained.transformers_names import KNOWN, in_transformers
from graft.quantization.choose import UNQUANTIZED, Quantization, can_quantize, settings_like
from graft.storage.lazy_tensors import Output, read, size_bytes, without_buffer_cache
from graft.storage.safetensors import load_safetensors, write_safetensors

import mlx.core as mx
import mlx.nn as nn

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Fusion:
    """An adapter, the model to fuse it into, and how the result is quantized.

    Attributes:
        model: folder or Hub name of the base model; `None` is the included one.
        adapter: the adapter.
        dequantize: write unquantized weights.
        q_bits: the bits of every quantized layer; `None` keeps those of the base model.
        more_bits: from path to bits, for single layers; `UNQUANTIZED` leaves a layer unquantized.
        prepared: from path to a file with the layer's quantized arrays, for single layers.
        name: the adapter's name in messages.
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
        The size of the base model's weights and of the fused ones, in bytes.

    Raises:
        InputError: the adapter does not fit the model, or a file is missing or damaged.
    """
    source = EMBEDDED_MODEL if fusion.model is None else find_folder(fusion.model)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(open_base(source, scratch))
        tied = is_tied(base.model)
        apply_adapter(base.model, fusion.adapter, name=fusion.name)
        if tied:
            _refuse_input_embeddings(base)
        before = sum(size_bytes(t) for t in base.tensors.values())
        stack.enter_context(without_buffer_cache())
        config, outputs = _plan(fusion, base)
        if fusion.dequantize and base.config["model_type"] in KNOWN:
            outputs = in_transformers(outputs, base.config["model_type"])
            config["tie_word_embeddings"] = tied
        write_safetensors(folder / WEIGHTS, outputs)
        copy_companions(source, folder)
        _save_config(config, folder)
    return before, sum(output.size_bytes for output in outputs)


def _plan(fusion: Fusion, base: BaseFiles) -> tuple[dict[str, Any], list[Output]]:
    """The fused model's configuration, and its tensors, which are computed as they are written."""
    halves = fusion.dequantize and rotary_order(base.model) == INTERLEAVED
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
        heads = head_count(base.config, path, str(base.folder)) if halves else None
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
    """The quantization in mlx-lm's form: the most frequent settings, and exceptions by path."""
    counts = Counter(tuple(settings.items()) for settings in quantized.values())
    common = dict(counts.most_common(1)[0][0])
    differing = {path: s for path, s in quantized.items() if s != common}
    for path, module in layers.items():
        base = adapted[path].base if path in adapted else module
        if hasattr(base, "to_quantized") and path not in quantized and not _inside(path, adapted):
            differing[path] = False  # type: ignore[assignment]
    return common | differing


def _target(fusion: Fusion, path: str, module: nn.Module) -> Quantization | None:
    """The settings to quantize a layer with in the fused model; `None` for no quantization."""
    if fusion.dequantize:
        return None
    bits = fusion.more_bits.get(path, fusion.q_bits)
    if bits == UNQUANTIZED:
        return None
    if is_quantized(module):
        return settings_like(module, bits)
    return settings_like(module, bits) if fusion.q_bits and can_quantize(module) else None


def _modules_in_order(base: BaseFiles) -> list[str]:
    """The paths of the modules that have tensors, each once, in the order of the file."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in base.tensors))


@dataclass
class _Layer:
    """One module of the base model, to be fused; its arrays exist only while it is written.

    Attributes:
        base: the base model.
        path: the module's path.
        module: the module of the architecture, with placeholders for arrays.
        adapted: the LoRA layer over the module, or `None`.
        target: the settings to quantize the module with, or `None`.
        heads: the number of heads, if the rows of q and k change from interleaved to halves.
        prepared: a file with the quantized weight, scales and biases, or `None`.
    """

    base: BaseFiles
    path: str
    module: nn.Module
    adapted: Any
    target: Quantization | None
    heads: int | None
    prepared: Path | None

    def outputs(self) -> list[Output]:
        """The tensors to write; reading the first one computes them all."""
        names = [n for n in self.base.tensors if n.rpartition(".")[0] == self.path]
        kept: dict[str, mx.array] = {}

        def blocks(name: str, *, first: bool) -> Iterator[mx.array]:
            if first:
                made = self._made(self._read(names))
                if self.prepared is not None:
                    # The model in memory may have a different precision than its files.
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
        """The fused arrays by their names in the module, from the base's arrays by full names."""
        given = {name.rpartition(".")[2]: array for name, array in arrays.items()}
        module = with_arrays(self.module, given)
        if self.adapted is not None:
            module = _over(module, self.adapted).fuse(dequantize=True)
        elif not _stays(self.module, self.target):
            module = dense_layer(module)
        fused = {name: module[name] for name in (*given, "weight") if name in module}
        if self.heads is not None:
            fused = {n: to_halves(a.T, self.heads).T for n, a in fused.items()}
        if self.target is not None and not is_quantized(module):
            packed = mx.quantize(fused.pop("weight"), **self.target)
            fused |= dict(zip(("weight", "scales", "biases"), packed, strict=False))
        return fused


def _stays(module: nn.Module, target: Quantization | None) -> bool:
    """Whether a layer without an adapter keeps its quantized arrays."""
    return is_quantized(module) and target == settings_like(module, None)


def _over(base: nn.Module, layer: Any) -> Any:
    """A layer's adapter over a copy of its base with other arrays.

    The adapted layer is built again because some methods keep values computed from the weight.
    """
    config = config_of(layer)
    kind = resolve_kind(base, config)
    assert kind is not None
    copy: Any = make_layer(base, config.rank, kind=kind, method=config.method, alpha=config.alpha)
    copy.load(layer.tensors())
    return copy


def _refuse_input_embeddings(base: BaseFiles) -> None:
    inputs = (EMBEDDING_INPUT.name, EMBEDDING_COLUMNS.name)
    paths = [path for path, layer in lora_layers(base.model) if layer.kind in inputs]
    if paths:
        raise InputError(
            f"{paths[0]} is adapted for the input only but shares its weight with the output: one "
            "weight cannot be both; use the adapter without fusing it"
        )


def _save_config(config: Mapping[str, Any], folder: Path) -> None:
    from mlx_lm.utils import save_config

    save_config(dict(config), folder / "config.json")


def quantized_bits(fusion: Fusion, model: nn.Module) -> dict[str, int]:
    """The bits of the layers that fusing quantizes, by path.

    Args:
        fusion: the adapter and how the result is quantized.
        model: the base model with the adapter attached.
    """
    adapted = dict(lora_layers(model))
    bits = {}
    for path, module in model.named_modules():
        base = adapted[path].base if path in adapted else module
        target = _target(fusion, path, base)
        unchanged = path not in adapted and _stays(base, target)
        if target is not None and not unchanged and not _inside(path, adapted):
            bits[path] = int(target["bits"])
    return bits


def _inside(path: str, adapted: Mapping[str, Any]) -> bool:
    """Whether a module is a child of an adapted layer."""
    return any(path.startswith(f"{layer}.") for layer in adapted)
