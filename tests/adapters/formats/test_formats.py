"""graft/formats: what each tool's files hold, byte by byte, and the way between them."""

import json
import random
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.factors import Factors, factors_of, from_factors
from graft.adapters.files import load_adapter, read_adapter
from graft.adapters.formats import detect_format, find_file
from graft.adapters.formats.gguf import write_gguf
from graft.adapters.formats.mlx_lm import write_mlx_lm
from graft.adapters.formats.peft import write_peft
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import LAYER_KINDS, LINEAR, FusedParts
from graft.adapters.rotary import interleave, to_halves
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.exporting.adapter import export
from graft.pretrained.architectures import HALVES, INTERLEAVED
from graft.pretrained.base_config import BaseConfig
from graft.storage.gguf_file import read_gguf_header

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import LLAMA, QWEN2, make_model

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


# ---- every pair ------------------------------------------------------------------------------

FORMS = ["npz", "mlx-lm", "peft", "gguf"]


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_every_pair_of_forms_round_trips_bit_for_bit(
    first: str, second: str, tmp_path: Path
) -> None:
    adapter = make_adapter()
    once = load_adapter(write(first, adapter, tmp_path / "1"))
    twice = load_adapter(write(second, once, tmp_path / "2"))
    assert twice.layers.keys() == SHAPES.keys()
    assert {(s.rank, s.alpha) for s in twice.layers.values()} == {(4, 6.0)}
    back = load_adapter(write("mlx-lm", twice, tmp_path / "3"))
    assert back.tensors.keys() == adapter.tensors.keys()
    for name, array in adapter.tensors.items():
        assert mx.array_equal(back.tensors[name], array), name
    np.testing.assert_array_equal(logits(twice), logits(adapter))


@pytest.mark.parametrize("form", FORMS)
def test_ranks_alphas_and_rslora_that_differ_come_through_to_rounding(
    form: str, tmp_path: Path
) -> None:
    settings = {
        Q: LayerConfig(2, 6.0),
        K: LayerConfig(8, 5.0),
        DOWN: LayerConfig(4, 3.0, "rslora"),
    }
    adapter = make_adapter(settings)
    found = deltas(load_adapter(write(form, adapter, tmp_path)))
    for path, delta in deltas(adapter).items():
        np.testing.assert_allclose(found[path], delta, rtol=2e-6, atol=1e-7)


def test_a_form_with_one_rank_pads_and_says_so(tmp_path: Path) -> None:
    adapter = make_adapter({Q: LayerConfig(2, 3.0), K: LayerConfig(8, 12.0)})
    notes = write_mlx_lm(adapter, tmp_path / "out", base=BASE)
    assert notes == ["padded with zeros to rank 8: 1 layers (exact, but larger)"]
    tensors = read_adapter(tmp_path / "out" / "adapters.safetensors").tensors
    assert mx.array_equal(tensors[f"{Q}.lora_a"][:, :2], adapter.tensors[f"{Q}.lora_a"])
    assert not tensors[f"{Q}.lora_a"][:, 2:].any()


def test_rslora_for_all_layers_stays_rslora_in_peft(tmp_path: Path) -> None:
    adapter = make_adapter({Q: LayerConfig(4, 6.0, "rslora"), K: LayerConfig(8, 5.0, "rslora")})
    again = load_adapter(write("peft", adapter, tmp_path))
    assert again.layers == adapter.layers
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True


def test_a_fused_projection_becomes_one_layer_with_a_rank_a_part() -> None:
    parts = FusedParts(("q", "k", "v"), (4, 2, 2), ("q", "v"), repeats=3)
    setting = LayerConfig(2, 3.0, "lora", "fused", parts)
    tensors = {"c_attn.lora_a": normal(16, 4), "c_attn.lora_b": normal(2, 18, seed=1)}
    found = factors_of(Adapter(tensors, {"c_attn": setting}), holder="any", kinds=(LINEAR,))
    layer = nn.Sequential(nn.Linear(16, 24))
    attach(layer, {"layers.0": setting})
    layer.layers[0].load({"lora_a": tensors["c_attn.lora_a"], "lora_b": tensors["c_attn.lora_b"]})
    product = found["c_attn"]
    mine = product.scale * (product.a @ product.b).T
    np.testing.assert_allclose(np.array(mine), np.array(layer.layers[0].delta()), atol=1e-6)


# ---- what the files hold ---------------------------------------------------------------------


def test_peft_s_names_shapes_and_configuration(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    assert tensors[f"base_model.model.{K}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"base_model.model.{K}.lora_B.weight"].shape == (32, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["target_modules"] == list(SHAPES)


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


def test_the_two_orders_undo_each_other() -> None:
    # Two heads of four: the first half of a head beside the second.
    rows = mx.arange(8)
    assert interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_halves(interleave(rows, 2), 2).tolist() == rows.tolist()


# ---- the MLX example's npz, both generations --------------------------------------------------


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


def test_the_old_npz_has_scale_2_and_interleaved_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = old_npz(tmp_path / "adapters.npz")
    adapter = load_adapter(tmp_path / "adapters.npz")
    said = capsys.readouterr().err
    assert "rank 8 from the shapes" in said and "scale 2," in said
    found = deltas(adapter, {**LLAMA, "rope_traditional": True})
    q, v = "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
    expected = {
        ours: 2 * (tensors[f"{theirs}.lora_a"] @ tensors[f"{theirs}.lora_b"]).T
        for ours, theirs in ((q, "layers.1.attention.wq"), (v, "layers.2.attention.wv"))
    }
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-4, atol=1e-5)
    halves = deltas(adapter)  # over a base in Hugging Face's order, q has its rows moved
    moved = expected[q].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_allclose(halves[q], moved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(halves[v], expected[v], rtol=1e-4, atol=1e-5)


def test_the_later_npz_has_scale_20_or_what_alpha_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (np.array(normal(*shape, seed=3)) for shape in ((64, 8), (8, 64)))
    np.savez(tmp_path / "adapters.npz", **{f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    found = deltas(load_adapter(tmp_path / "adapters.npz"))
    assert "scale 20," in capsys.readouterr().err
    np.testing.assert_allclose(found[Q], 20 * (a @ b).T, rtol=1e-4, atol=1e-5)
    adapter = load_adapter(tmp_path / "adapters.npz", alpha=4.0)
    assert adapter.layers[Q].alpha == 4.0
    assert "alpha 4" in capsys.readouterr().err
    assert mx.array_equal(adapter.tensors[f"{Q}.lora_a"], mx.array(a))


# ---- ggla and GGUF, byte by byte ----------------------------------------------------------------


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


@pytest.mark.parametrize("names", ["blk.0.attn_", "layers.0.attention.w"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_ggla_file_made_byte_by_byte(tmp_path: Path, names: str, dtype: str) -> None:
    a = {key: np.array(normal(64, 2, seed=n)).astype(dtype) for n, key in enumerate("qv")}
    b = {"q": np.array(normal(64, 2, seed=8)), "v": np.array(normal(32, 2, seed=9))}
    content = {}
    for key in "qv":
        content[f"{names}{key}.weight.loraA"] = a[key]
        content[f"{names}{key}.weight.loraB"] = b[key]
    (tmp_path / "ggml-adapter-model.bin").write_bytes(ggla(content))
    found = deltas(load_adapter(tmp_path), {**LLAMA, "rope_traditional": True})
    for key in "qv":
        expected = 3 * b[key] @ a[key].astype(np.float32).T
        path = f"model.layers.0.self_attn.{key}_proj"
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6)


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


# ---- embeddings --------------------------------------------------------------------------------


def embedding_adapter(config: dict[str, Any]) -> Adapter:
    model = make_model(config)
    attach(model, plan(model, "q_proj,embed_tokens", rank=4, alpha=6.0))
    tensors = {}
    for number, (path, layer) in enumerate(lora_layers(model)):
        for half in ("a", "b"):
            shape = layer[f"lora_{half}"].shape
            tensors[f"{path}.lora_{half}"] = normal(*shape, seed=number)
    return Adapter(tensors, {path: LayerConfig(4, 6.0) for path, _ in lora_layers(model)})


def test_a_tied_embedding_goes_through_peft_as_two_layers(tmp_path: Path) -> None:
    adapter, base = embedding_adapter(QWEN2), BaseConfig("tiny", QWEN2)
    assert "--model" in refusal(lambda: write_peft(adapter, tmp_path / "p"))
    notes = write_peft(adapter, tmp_path / "p", base=base)
    assert notes == ["model.embed_tokens is tied to the output: lm_head was given the same update"]
    again = load_adapter(tmp_path / "p")
    assert "lm_head" not in again.layers
    np.testing.assert_array_equal(logits(again, QWEN2), logits(adapter, QWEN2))


@pytest.mark.parametrize(
    ("path", "kind", "a_shape"),
    [
        ("model.embed_tokens", "embedding", (512, 4)),
        ("model.embed_tokens", "embedding-input", (512, 4)),
        ("model.layers.0.conv", "conv", (3, 64, 4)),
        ("model.layers.0.conv", "conv", (3, 3, 64, 4)),
        ("model.layers.0.mlp.switch_mlp.up_proj", "experts", (2, 4, 64)),
    ],
)
def test_kinds_that_others_tell_stand_in_graft_s_own_form(
    path: str, kind: str, a_shape: tuple[int, ...], tmp_path: Path
) -> None:
    b_shape = (2, 64, 4) if kind == "experts" else (4, 64)
    layer_kind = LAYER_KINDS[kind]
    factors = Factors(layer_kind, mx.ones(a_shape), mx.ones(b_shape), 6.0)
    place = write("npz", from_factors({path: factors}), tmp_path)
    (found,) = factors_of(load_adapter(place), holder="test", kinds=(layer_kind,)).values()
    assert (found.kind, found.a.shape, found.b.shape) == (layer_kind, a_shape, b_shape)


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["untied", "tied"])
def test_an_embedding_of_mlx_lm_works_after_it_went_through_graft_s_own_form(
    config: dict[str, Any], tmp_path: Path
) -> None:
    adapter = embedding_adapter(config)
    write_mlx_lm(adapter, tmp_path / "mlx-lm", base=BaseConfig("base", config))
    place = write("npz", load_adapter(tmp_path / "mlx-lm"), tmp_path)
    np.testing.assert_array_equal(logits(load_adapter(place), config), logits(adapter, config))


@pytest.mark.parametrize("form", ["peft", "gguf", "mlx-lm"])
def test_an_embedding_beside_its_own_head_goes_through(form: str, tmp_path: Path) -> None:
    adapter = embedding_adapter(LLAMA)
    again = load_adapter(write(form, adapter, tmp_path))
    np.testing.assert_array_equal(logits(again), logits(adapter))


def test_an_input_embedding_alone_leaves_a_tied_output_as_it_was(tmp_path: Path) -> None:
    # PEFT adapts a tied embedding at the input only.
    adapter = embedding_adapter(QWEN2)
    layers = adapter.layers | {"model.embed_tokens": LayerConfig(4, 6.0, kind="embedding-input")}
    adapter = replace(adapter, layers=layers)
    model = make_model(QWEN2)
    apply_adapter(model, adapter, name="test")
    embedding = model.model.embed_tokens
    x = normal(1, 3, 64, seed=9)
    assert mx.array_equal(embedding.as_linear(x), embedding.base.as_linear(x))
    assert not mx.array_equal(embedding(TOKENS), embedding.base(TOKENS))
    write_peft(adapter, tmp_path / "p", base=BaseConfig("tiny", QWEN2))
    again = load_adapter(tmp_path / "p")
    np.testing.assert_array_equal(logits(again, QWEN2), logits(adapter, QWEN2))
    refused = refusal(lambda: write_mlx_lm(adapter, tmp_path / "m", base=BaseConfig("tiny", QWEN2)))
    assert "model.embed_tokens" in refused


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "settings", "named"),
    [
        ("peft", {Q: LayerConfig(1, 1.0, "vera"), K: LayerConfig(4, 6.0)}, f"{Q} (vera)"),
        ("mlx-lm", {Q: LayerConfig(1, 1.0, "ia3"), K: LayerConfig(4, 6.0)}, f"{Q} (ia3)"),
        ("gguf", {Q: LayerConfig(4, 6.0, "dora"), K: LayerConfig(4, 6.0)}, f"{Q} (dora)"),
        ("gguf", {Q: LayerConfig(1, 1.0, "full"), K: LayerConfig(1, 1.0, "bias")}, f"{K} (bias)"),
        ("gguf", {DOWN: LayerConfig(1, 1.0, "norm", "vector")}, f"{DOWN} (norm, a vector)"),
        ("mlx-lm", {Q: LayerConfig(4, 6.0, "merge-first", "weight")}, f"{Q} (of kind weight)"),
    ],
)
def test_what_a_form_cannot_hold_is_named(
    form: str, settings: dict[str, LayerConfig], named: str, tmp_path: Path
) -> None:
    assert named in refusal(lambda: write(form, make_adapter(settings), tmp_path))


def test_gguf_refuses_a_tied_head_and_an_unknown_architecture(tmp_path: Path) -> None:
    adapter = embedding_adapter(QWEN2)
    write_to = write_gguf
    tied = refusal(lambda: write_to(adapter, tmp_path / "a.gguf", base=BaseConfig("t", QWEN2)))
    assert "model.embed_tokens" in tied
    other = BaseConfig("t", {**LLAMA, "model_type": "rwkv7"})
    assert "rwkv7" in refusal(lambda: write_to(adapter, tmp_path / "a.gguf", base=other))
    assert "--model" in refusal(lambda: write_to(adapter, tmp_path / "a.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["mlx-lm", "peft", "gguf"])
def test_an_output_that_exists_is_kept_without_force(form: str, tmp_path: Path) -> None:
    place = write(form, make_adapter(), tmp_path)
    assert "--force" in refusal(lambda: write(form, make_adapter(), tmp_path))
    export(make_adapter(), place, to=form, base=BASE, force=True)


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "VERA"}, "'VERA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": 3}, "something_new 3"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": "6"}, "lora_alpha '6'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "(a+)+$"),
        ({"alpha_pattern": {"(": 3}}, "'('"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"lora_dropout": 2}, "lora_dropout 2"),
    ],
)
def test_peft_options_that_would_change_the_result_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    change(folder / "adapter_config.json", **changes)
    assert named in refusal(lambda: load_adapter(folder))


def test_alpha_patterns_of_peft_are_matched_as_peft_does(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    patterns = {r"layers\.1\.self_attn\.[a-z]_proj": 3.0, "proj": 99.0, "down_proj": 5.0}
    change(folder / "adapter_config.json", alpha_pattern=patterns)
    alphas = {path: setting.alpha for path, setting in load_adapter(folder).layers.items()}
    assert alphas == {Q: 6.0, K: 3.0, DOWN: 5.0}  # "proj" is no whole part of a path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fine_tune_type": "full"}, "'full'"),
        ({"lora_parameters": {"rank": 4, "alpha": 6}}, "scale None"),
        ({"lora_parameters": {"rank": 4, "scale": "1"}}, "scale '1'"),
        ({"fine_tune_type": "dora"}, f"{Q}.m"),
    ],
)
def test_mlx_lm_folders_that_are_no_lora_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = write("mlx-lm", make_adapter(), tmp_path)
    change(folder / "adapter_config.json", **changes)
    assert named in refusal(lambda: load_adapter(folder))


@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
def test_halves_that_are_missing_and_numbers_that_are_none_are_named(
    form: str, tmp_path: Path
) -> None:
    folder = write(form, make_adapter(), tmp_path)
    file = find_file(folder)
    tensors = mx.load(str(file))
    name = next(name for name in tensors if K in name and name.endswith(("lora_b", "B.weight")))
    mx.save_safetensors(str(file), {n: a for n, a in tensors.items() if n != name})
    assert f"{K} has no B" in refusal(lambda: load_adapter(folder)).replace("base_model.model.", "")
    mx.save_safetensors(str(file), {**tensors, name: tensors[name] * mx.array(float("nan"))})
    assert f"{K}: B holds numbers that are not finite" in refusal(lambda: load_adapter(folder))
    mx.save_safetensors(str(file), {**tensors, name: tensors[name].astype(mx.int32)})
    assert "int32" in refusal(lambda: load_adapter(folder))
    mx.save_safetensors(str(file), {**tensors, name: tensors[name][:, :3][:3]})
    assert f"{K}: A of shape" in refusal(lambda: load_adapter(folder))


def test_the_wrong_base_model_is_named(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    adapter = load_adapter(folder)
    wide = make_model({**LLAMA, "intermediate_size": 96})
    text = refusal(lambda: apply_adapter(wide, adapter, name="mine"))
    assert f"{DOWN}.lora_a has shape (128, 4), the model needs (96, 4)" in text


def test_folders_and_files_that_tell_nothing_are_named(tmp_path: Path) -> None:
    assert "holds no adapter" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapters.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert "does not say what it is" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"x": 1}')
    assert "no adapter that Graft knows" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapters.npz").write_bytes(b"")
    assert "name one of them" in refusal(lambda: load_adapter(tmp_path))


# ---- broken files ----------------------------------------------------------------------------


def sample(form: str, folder: Path) -> Path:
    """A small file of a form, with what belongs beside it; returns the file."""
    if form == "ggla":
        folder.mkdir(parents=True)
        tensors = half_layer()
        content = {
            "blk.0.attn_v.weight.loraA": tensors["blk.0.attn_v.weight.lora_a"].T.copy(),
            "blk.0.attn_v.weight.loraB": tensors["blk.0.attn_v.weight.lora_b"],
        }
        (folder / "a.bin").write_bytes(ggla(content))
        return folder / "a.bin"
    if form == "old npz":
        folder.mkdir(parents=True)
        old_npz(folder / "adapters.npz")
        return folder / "adapters.npz"
    return find_file(write(form, make_adapter(), folder))


EVERY = [*FORMS, "ggla", "old npz"]


def outcome(path: Path) -> str:
    """What loading says: nothing, or one line; anything but an InputError is a failure."""
    try:
        load_adapter(path)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("form", EVERY)
def test_truncated_files_are_named_in_one_line(form: str, tmp_path: Path) -> None:
    path = sample(form, tmp_path / "f")
    whole = path.read_bytes()
    for length in {*range(0, 64), *range(64, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert str(path) in outcome(path), length


@pytest.mark.parametrize("form", EVERY)
def test_fuzzed_files_give_one_line_quickly_and_little_memory(form: str, tmp_path: Path) -> None:
    path = sample(form, tmp_path / "f")
    whole, rng = path.read_bytes(), random.Random(form)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            # The head and the tail of a file are where its sizes stand.
            place = rng.choice((rng.randrange(len(whole)), rng.randrange(min(400, len(whole)))))
            content[rng.choice((place, -1 - place))] = rng.choice((0, 1, 127, 128, 255))
        path.write_bytes(content)
        refused += bool(outcome(path))
    assert refused > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert time.perf_counter() - start < 120


def bomb(form: str, folder: Path) -> Path:
    """A small file whose header tells of terabytes."""
    folder.mkdir()
    path = folder / "adapters.safetensors"
    (folder / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "lora_parameters": {"scale": 1}}'
    )
    huge = 1 << 40
    if form == "safetensors":
        entry = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
        header = json.dumps({f"{Q}.lora_a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    elif form == "safetensors header":
        path.write_bytes(struct.pack("<Q", huge) + b"{}")
    elif form == "safetensors nesting":
        path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    elif form == "safetensors overlap":
        entry = {"dtype": "F32", "shape": [250_000], "data_offsets": [0, 1_000_000]}
        header = json.dumps({f"{n}.lora_a": entry for n in range(5000)}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1_000_000))
    elif form == "gguf list":
        path.write_bytes(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"k"
            + struct.pack("<IIQ", 9, 0, huge)
        )
    elif form == "gguf counts":
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, huge, huge) + bytes(64))
    elif form == "gguf shape":
        content = gguf(half_layer(), METADATA)
        told = struct.pack("<2Q", 64, 2)
        path.write_bytes(content.replace(told, struct.pack("<2Q", huge, huge)))
    elif form == "ggla shape":
        name = b"blk.0.attn_v.weight.loraA"
        start = struct.pack("<IIii", 0x67676C61, 1, 2, 6) + struct.pack("<iii", 2, len(name), 0)
        path.write_bytes(start + struct.pack("<2i", 2**31 - 1, 2**31 - 1) + name)
    elif form == "npz shape":
        import io
        import zipfile

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (huge,)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{Q}.lora_a.npy", header.getvalue())
    else:
        np.savez_compressed(path.with_suffix(".npz"), **{f"{Q}.lora_a": np.zeros((64, 1_000_000))})
        return path.with_suffix(".npz")
    return path


@pytest.mark.parametrize(
    "form",
    [
        *("safetensors", "safetensors header", "safetensors nesting", "safetensors overlap"),
        *("gguf list", "gguf counts", "gguf shape", "ggla shape", "npz shape", "npz bomb"),
    ],
)
def test_headers_that_lie_take_neither_time_nor_memory(form: str, tmp_path: Path) -> None:
    path = bomb(form, tmp_path / "f")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert "damaged or incomplete" in outcome(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.perf_counter() - start < 10


def test_content_tells_the_form_whatever_the_name(tmp_path: Path) -> None:
    for form, name in (("gguf", "gguf"), ("ggla", "ggla"), ("old npz", "npz")):
        path = sample(form, tmp_path / form)
        odd = path.rename(path.with_name("thing.dat"))
        assert detect_format(odd).name == name
        assert outcome(odd) == ""
