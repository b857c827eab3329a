"""Small adapters of a tiny Llama, and files of every format with them, made by hand."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.exporting.adapter import export
from graft.pretrained.base_config import BaseConfig

import mlx.core as mx
import numpy as np
import pytest

from support.tiny import LLAMA, make_model

TOKENS = mx.array([[1, 5, 9, 300, 7, 2]])
Q, K, DOWN = (
    f"model.layers.{name}_proj" for name in ("0.self_attn.q", "1.self_attn.k", "2.mlp.down")
)
SHAPES = {Q: (64, 64), K: (64, 32), DOWN: (128, 64)}
BASE = BaseConfig("tiny", LLAMA)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return 0.2 * mx.random.normal(shape, key=mx.random.key(seed))


def make_adapter(settings: dict[str, LayerConfig] | None = None, **values: Any) -> Adapter:
    """Random A and B for three layers of the tiny Llama."""
    layers = settings or dict.fromkeys(SHAPES, LayerConfig(4, 6.0))
    tensors = {}
    for number, (path, setting) in enumerate(layers.items()):
        inputs, outputs = SHAPES[path]
        tensors[f"{path}.lora_a"] = normal(inputs, setting.rank, seed=2 * number)
        tensors[f"{path}.lora_b"] = normal(setting.rank, outputs, seed=2 * number + 1)
    return Adapter(tensors, layers, **{"base_model": "tiny", **values})


def write(form: str, adapter: Adapter, folder: Path) -> Path:
    """Write an adapter in one form; returns what names it."""
    place = folder / ("adapter.gguf" if form == "gguf" else form)
    export(adapter, place, to=form, base=BASE)
    return place


def logits(adapter: Adapter, config: dict[str, Any] = LLAMA) -> np.ndarray:
    model = make_model(config)
    apply_adapter(model, adapter, name="test")
    model.eval()
    return np.array(model(TOKENS))


def deltas(adapter: Adapter, config: dict[str, Any] = LLAMA) -> dict[str, np.ndarray]:
    model = make_model(config)
    apply_adapter(model, adapter, name="test")
    return {path: np.array(layer.delta()) for path, layer in lora_layers(model)}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


FORMS = ["npz", "mlx-lm", "peft", "gguf"]


def old_npz(path: Path) -> dict[str, np.ndarray]:
    """As `lora.py` of the MLX example saved before 2024-01-09."""
    rng = np.random.default_rng(0)
    tensors = {
        "layers.1.attention.wq.lora_a": rng.normal(size=(64, 8)),
        "layers.1.attention.wq.lora_b": rng.normal(size=(8, 64)) / 8,
        "layers.2.attention.wv.lora_a": rng.normal(size=(64, 8)),
        "layers.2.attention.wv.lora_b": rng.normal(size=(8, 32)) / 8,
    }
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    np.savez(path, **tensors)
    return tensors


def ggla(tensors: dict[str, np.ndarray], *, rank: int = 2, alpha: int = 6) -> bytes:
    """As llama.cpp's convert-lora-to-ggml.py wrote it."""
    out = struct.pack("<IIii", 0x67676C61, 1, rank, alpha)
    for name, array in tensors.items():
        kind = {np.dtype("float32"): 0, np.dtype("float16"): 1}[array.dtype]
        out += struct.pack("<iii", array.ndim, len(name), kind)
        out += struct.pack(f"<{array.ndim}i", *array.shape[::-1]) + name.encode()
        out += bytes(-len(out) % 32) + array.tobytes()
    return out


def gguf(
    tensors: dict[str, np.ndarray], metadata: dict[str, Any], *, kinds: dict[str, int] | None = None
) -> bytes:
    """A GGUF file, version 3, as its specification has it."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        text = isinstance(value, str)
        out += string(key) + struct.pack("<I", 8 if text else 6)
        out += string(value) if text else struct.pack("<f", value)
    data = b""
    for name, array in tensors.items():
        out += string(name) + struct.pack("<I", array.ndim)
        out += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        out += struct.pack("<IQ", (kinds or {}).get(name, 0), len(data))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return out + bytes(-len(out) % 32) + data


METADATA = {
    "general.type": "adapter",
    "general.architecture": "llama",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}


def half_layer(name: str = "blk.0.attn_v", *, outputs: int = 32, rank: int = 2) -> dict[str, Any]:
    a, b = normal(rank, 64, seed=5), normal(outputs, rank, seed=6)
    return {f"{name}.weight.lora_a": np.array(a), f"{name}.weight.lora_b": np.array(b)}


def embedding_adapter(config: dict[str, Any]) -> Adapter:
    model = make_model(config)
    attach(model, plan(model, "q_proj,embed_tokens", rank=4, alpha=6.0))
    tensors = {}
    for number, (path, layer) in enumerate(lora_layers(model)):
        for half in ("a", "b"):
            shape = layer[f"lora_{half}"].shape
            tensors[f"{path}.lora_{half}"] = normal(*shape, seed=number)
    return Adapter(tensors, {path: LayerConfig(4, 6.0) for path, _ in lora_layers(model)})


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
