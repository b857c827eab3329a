"""graft/adapters/formats/gguf.py: what the files hold, byte by byte."""

import struct
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.files import load_adapter, read_adapter
from graft.adapters.formats.gguf import write_gguf
from graft.adapters.formats.peft import write_peft
from graft.adapters.rotary import to_halves
from graft.pretrained.architectures import HALVES, INTERLEAVED
from graft.pretrained.base_config import BaseConfig
from graft.storage.gguf_file import read_gguf_header

import mlx.core as mx
import numpy as np
import pytest

from support.adapter_cases import (
    DOWN,
    METADATA,
    K,
    Q,
    deltas,
    embedding_adapter,
    gguf,
    half_layer,
    make_adapter,
    refusal,
    write,
)
from support.tiny import LLAMA, QWEN2


def test_gguf_interleaves_q_and_k_and_nothing_else(tmp_path: Path) -> None:
    adapter = make_adapter()
    content = memoryview(write("gguf", adapter, tmp_path).read_bytes())
    metadata, fields = read_gguf_header(content)
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == "llama"
    assert metadata["adapter.lora.alpha"] == 6.0

    def stored(name: str) -> np.ndarray:
        field = fields[name]
        return np.frombuffer(content, "<f4", int(np.prod(field.shape)), field.offset).reshape(
            field.shape
        )

    for name, path, heads in (("blk.0.attn_q", Q, 4), ("blk.1.attn_k", K, 2)):
        b = np.array(adapter.tensors[f"{path}.lora_b"]).T  # (out, rank), as in formats.md
        expected = b.reshape(heads, 2, 8, 4).swapaxes(1, 2).reshape(b.shape)
        np.testing.assert_array_equal(stored(f"{name}.weight.lora_b"), expected)
        a = np.array(adapter.tensors[f"{path}.lora_a"]).T
        np.testing.assert_array_equal(stored(f"{name}.weight.lora_a"), a)
    down = np.array(adapter.tensors[f"{DOWN}.lora_b"]).T
    np.testing.assert_array_equal(stored("blk.2.ffn_down.weight.lora_b"), down)


def test_gguf_for_qwen_moves_no_row(tmp_path: Path) -> None:
    adapter = make_adapter()
    write_gguf(adapter, tmp_path / "a.gguf", base=BaseConfig("tiny", QWEN2))
    again = load_adapter(tmp_path / "a.gguf")
    assert again.rotary == HALVES
    assert mx.array_equal(again.tensors[f"{Q}.lora_b"], adapter.tensors[f"{Q}.lora_b"])


def test_an_adapter_of_an_interleaved_base_is_not_interleaved_again(tmp_path: Path) -> None:
    # Meta's own layout, which Graft runs with rope_traditional, has llama.cpp's order already.
    adapter = make_adapter()
    meta = BaseConfig("tiny", {**LLAMA, "rope_traditional": True})
    write_gguf(adapter, tmp_path / "a.gguf", base=meta)
    again = read_adapter(tmp_path / "a.gguf")
    assert again.rotary == INTERLEAVED
    assert mx.array_equal(again.tensors[f"{Q}.lora_b"], adapter.tensors[f"{Q}.lora_b"])
    write_peft(adapter, tmp_path / "peft", base=meta)
    halves = read_adapter(tmp_path / "peft" / "adapter_model.safetensors")
    expected = to_halves(adapter.tensors[f"{Q}.lora_b"], 4)
    assert mx.array_equal(halves.tensors[f"{Q}.lora_b"], expected)


@pytest.mark.parametrize(("kind", "dtype"), [(0, np.float32), (1, np.float16)])
def test_a_gguf_file_made_byte_by_byte(tmp_path: Path, kind: int, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in half_layer().items()}
    content = gguf(tensors, METADATA, kinds=dict.fromkeys(tensors, kind))
    (tmp_path / "a.gguf").write_bytes(content)
    found = deltas(load_adapter(tmp_path / "a.gguf"))["model.layers.0.self_attn.v_proj"]
    a, b = (tensors[f"blk.0.attn_v.weight.lora_{half}"].astype(np.float32) for half in "ab")
    np.testing.assert_allclose(found, 3 * b @ a, rtol=1e-5, atol=1e-6)


def test_a_quantized_gguf_adapter_is_read(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType.Q8_0
    whole = half_layer(rank=32)
    packed = {name: quantize(array, kind) for name, array in whole.items()}
    content = gguf(packed, METADATA, kinds=dict.fromkeys(packed, int(kind)))
    for name, array in whole.items():  # a header tells elements, not bytes
        told = struct.pack("<2Q", *packed[name].shape[::-1])
        key = name.encode() + struct.pack("<I", 2)
        content = content.replace(key + told, key + struct.pack("<2Q", *array.shape[::-1]))
    (tmp_path / "a.gguf").write_bytes(content)
    tensors = load_adapter(tmp_path / "a.gguf").tensors
    expected = dequantize(packed["blk.0.attn_v.weight.lora_a"], kind).T
    found = tensors["model.layers.0.self_attn.v_proj.lora_a"]
    np.testing.assert_array_equal(np.array(found), expected)


def test_alpha_0_in_gguf_is_a_scale_of_1(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf(half_layer(), {**METADATA, "adapter.lora.alpha": 0.0}))
    setting = load_adapter(tmp_path / "a.gguf").layers["model.layers.0.self_attn.v_proj"]
    assert setting.alpha / setting.rank == 1


def test_gguf_refuses_a_tied_head_and_an_unknown_architecture(tmp_path: Path) -> None:
    adapter = embedding_adapter(QWEN2)
    write_to = write_gguf
    tied = refusal(lambda: write_to(adapter, tmp_path / "a.gguf", base=BaseConfig("t", QWEN2)))
    assert "model.embed_tokens" in tied
    other = BaseConfig("t", {**LLAMA, "model_type": "rwkv7"})
    assert "rwkv7" in refusal(lambda: write_to(adapter, tmp_path / "a.gguf", base=other))
    assert "--model" in refusal(lambda: write_to(adapter, tmp_path / "a.gguf"))
    assert list(tmp_path.iterdir()) == []
