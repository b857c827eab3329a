import io
import json
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.errors import InputError
from graft.pretrained.load import build_model, load_model, read_model
from graft.pretrained.tokenizer import SentencePieceTokenizer
from graft.runtime import cpu as backend
from graft.storage.json_file import read_json_file
from graft.storage.tensor_file import read_weight_file

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.architectures import read_configs
from support.paths import ROOT
from support.tiny import LLAMA, QWEN2, make_model, write_model

TOKENS = mx.array([[1, 5, 9, 300, 7, 2]])
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 1.0},
    "gpt2": {
        "n_ctx": 128,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}

# Reads a folder in a process of its own: damage must not end it by a signal.
READ = """
import sys
import graft
from pathlib import Path
from graft.errors import InputError
from graft.pretrained.load import read_model
for folder in sys.argv[1:]:
    try:
        read_model(Path(folder))
        print("loaded")
    except InputError as error:
        print(repr(str(error)))
"""


@pytest.fixture(autouse=True)
def plain_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare bits with models that nothing was done for: fast functions round differently."""
    monkeypatch.setenv("GRAFT_SHORTCUTS", "off")


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def weights_of(folder: Path) -> Path:
    return next(p for p in folder.iterdir() if p.suffix in (".npz", ".safetensors"))


def change_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> Path:
    path = weights_of(folder)
    weights = dict(mx.load(str(path)).items())
    mx.eval(weights)
    change(weights)
    if path.suffix == ".npz":
        mx.savez(str(path), **weights)
    else:
        mx.save_safetensors(str(path), weights)
    return folder


@pytest.mark.parametrize("form", ["npz", "safetensors"])
@pytest.mark.parametrize("config", [LLAMA, QWEN2])
def test_a_written_model_comes_back_with_its_logits(
    tmp_path: Path, form: str, config: dict[str, Any]
) -> None:
    expected = make_model(config)(TOKENS)
    model, tokenizer, read = load_model(write_model(tmp_path / "m", config, form=form))
    assert mx.array_equal(model(TOKENS), expected)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert read["model_type"] == config["model_type"]
    assert not model.training


@pytest.mark.parametrize("form", ["npz", "safetensors"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_model_comes_back_with_its_logits(tmp_path: Path, form: str, bits: int) -> None:
    folder = write_model(tmp_path / "m", bits=bits, group_size=64, form=form)
    expected = make_model(LLAMA)
    nn.quantize(expected, group_size=64, bits=bits)
    model, _ = read_model(folder)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert (layer.bits, layer.group_size) == (bits, 64)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(expected(TOKENS)), atol=1e-5)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16)])
def test_other_modes_of_quantization_come_back(
    tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    folder = write_model(tmp_path / "m")
    expected = make_model(LLAMA)
    nn.quantize(expected, group_size=group_size, bits=bits, mode=mode)
    mx.save_safetensors(str(weights_of(folder)), dict(tree_flatten(expected.parameters())))
    change_config(folder, quantization={"group_size": group_size, "bits": bits, "mode": mode})
    model, _ = read_model(folder)
    assert model.lm_head.mode == mode
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(expected(TOKENS)), atol=1e-5)


def test_layers_may_be_whole_or_differ_in_their_bits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    expected = make_model(LLAMA)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.endswith("down_proj"):
            return {"group_size": 64, "bits": 8, "mode": "affine"}
        return path != "lm_head" and hasattr(module, "to_quantized")

    nn.quantize(expected, group_size=32, bits=3, class_predicate=choose)
    mx.save_safetensors(str(weights_of(folder)), dict(tree_flatten(expected.parameters())))
    change_config(folder, quantization={"group_size": 32, "bits": 3})
    model, _ = read_model(folder)
    assert type(model.lm_head) is nn.Linear
    assert model.model.layers[1].mlp.down_proj.bits == 8
    assert model.model.layers[1].mlp.up_proj.bits == 3
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(expected(TOKENS)), atol=1e-5)


@pytest.mark.parametrize("form", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_comes_back_value_for_value(
    tmp_path: Path, form: str, dtype: mx.Dtype
) -> None:
    folder = write_model(tmp_path / "m", form=form)

    def halve(weights: dict[str, mx.array]) -> None:
        weights.update({name: array.astype(dtype) for name, array in weights.items()})

    change_weights(folder, halve)
    tensors = read_weight_file(weights_of(folder))
    for name, array in tree_flatten(make_model(LLAMA).parameters()):
        assert tensors[name].dtype == dtype
        assert mx.array_equal(tensors[name], array.astype(dtype))
    model, _ = read_model(folder)
    expected = mx.float32 if backend.runs_on_cpu() else dtype
    assert model.lm_head.weight.dtype == expected


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_file_of_numpy_is_read(tmp_path: Path, write: Callable[..., None]) -> None:
    folder = write_model(tmp_path / "m", form="npz")
    arrays = {name: np.array(array) for name, array in read_weight_file(weights_of(folder)).items()}
    write(weights_of(folder), **{name: array.astype(np.float64) for name, array in arrays.items()})
    model, _ = read_model(folder)
    assert mx.array_equal(model(TOKENS), make_model(LLAMA)(TOKENS))


def test_an_npz_file_reads_as_mlx_reads_it(tmp_path: Path) -> None:
    arrays = {
        "scalar": mx.array(1.5),
        "empty": mx.zeros((0, 3)),
        "packed": mx.array([[1, 2**32 - 1]], dtype=mx.uint32),
        "bytes": mx.array([0, 255], dtype=mx.uint8),
        "half": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "flags": mx.array([True, False]),
    }
    mx.savez(str(tmp_path / "a.npz"), **arrays)
    found = read_weight_file(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert mx.array_equal(found[name], array)


def test_several_safetensors_files_make_one_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = list(mx.load(str(weights_of(folder))).items())
    mx.eval([array for _, array in weights])
    weights_of(folder).unlink()
    for number, part in enumerate((weights[:9], weights[9:]), 1):
        path = folder / f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(path), dict(part))
    model, _ = read_model(folder)
    assert mx.array_equal(model(TOKENS), make_model(LLAMA)(TOKENS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_of_mlx_lm_load(tmp_path: Path, name: str) -> None:
    config = {**SMALL, "model_type": name, **ARCHITECTURES[name]}
    expected = make_model(config)
    expected.eval()
    model, _ = read_model(write_model(tmp_path / "m", config))
    assert type(model).__module__ == f"mlx_lm.models.{name}"
    assert mx.array_equal(model(TOKENS), expected(TOKENS))


def test_generation_config_tells_what_ends_texts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_model(folder)[1].eos_token_ids == {2, 7}


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        del weights["model.norm.weight"]
        del weights["lm_head.weight"]
        weights["model.layers.7.mlp.up_proj.weight"] = mx.zeros((2, 2))
        weights["model.layers.0.mlp.up_proj.weight"] = mx.zeros((2, 2))
        weights["model.embed_tokens.weight"] = mx.zeros((512, 65))

    text = refusal(read_model, change_weights(write_model(tmp_path / "m"), spoil))
    assert "model.norm.weight is missing" in text
    assert "lm_head.weight is missing" in text
    assert "model.layers.7.mlp.up_proj.weight is not part of this architecture" in text
    assert "model.layers.0.mlp.up_proj.weight has shape (2, 2), not (128, 64)" in text
    assert "model.embed_tokens.weight has shape (512, 65), not (512, 64)" in text
    assert str(tmp_path / "m") in text


def test_quantized_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        del weights["lm_head.biases"]
        weights["model.layers.0.mlp.up_proj.biases"] = mx.zeros((128, 3))

    text = refusal(read_model, change_weights(write_model(tmp_path / "m", bits=4), spoil))
    assert "lm_head.biases is missing" in text
    assert "model.layers.0.mlp.up_proj.biases has shape (128, 3), not (128, 2)" in text


def test_a_packing_that_no_quantization_has_is_refused(tmp_path: Path) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"] = mx.zeros((128, 14), dtype=mx.uint32)

    text = refusal(read_model, change_weights(write_model(tmp_path / "m", bits=4), spoil))
    assert "bad quantization" in text and "7" in text


def test_a_quantized_model_whose_config_forgot_it_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", bits=4)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert "lm_head.scales is not part of this architecture" in refusal(read_model, folder)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    config = {**SMALL, "model_type": "mixtral", **ARCHITECTURES["mixtral"]}
    folder = write_model(tmp_path / "m", config)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def as_hugging_face(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if "switch_mlp" in name]:
            start, end = name.split("switch_mlp.")
            array = weights.pop(name)
            for expert in range(4):
                weights[f"{start}experts.{expert}.{names[end.split('.')[0]]}.weight"] = array[
                    expert
                ]

    change_weights(folder, as_hugging_face)
    assert mx.array_equal(read_model(folder)[0](TOKENS), make_model(config)(TOKENS))
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"

    def lose(weights: dict[str, mx.array]) -> None:
        del weights[lost]

    change_weights(folder, lose)
    assert lost in refusal(read_model, folder)


def damage_npz(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    generator = random.Random(0)
    damaged = {
        "empty": b"",
        "no zip": b"junk" * 500,
        "half": whole[: len(whole) // 2],
        "a byte short": whole[:-1],
    }
    for number in range(4):
        spoilt = bytearray(whole)
        place = generator.randrange(200, len(whole) - 8000)
        spoilt[place : place + 64] = generator.randbytes(64)
        damaged[f"changed {number}"] = bytes(spoilt)
    arrays = {name: np.array(array) for name, array in mx.load(str(path)).items()}
    np.savez_compressed(path, **arrays)
    spoilt = bytearray(path.read_bytes())
    spoilt[3000:3100] = b"\xff" * 100
    damaged["deflated"] = bytes(spoilt)
    np.savez(path, **{**arrays, "lm_head.weight": np.array([{"a": 1}], dtype=object)})
    damaged["pickled"] = path.read_bytes()
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("read.me", "no array")
    damaged["no array"] = path.read_bytes()
    members = {f"{name}.npy": io.BytesIO() for name in arrays}
    for array, member in zip(arrays.values(), members.values(), strict=True):
        np.save(member, array)
    for case, spoil in {
        "member cut": lambda b: b[:-9],
        "member longer": lambda b: b + b"9",
    }.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, spoil(member.getvalue()))
        damaged[case] = path.read_bytes()
    return damaged


def damage_safetensors(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def with_entry(**changes: Any) -> bytes:
        changed = {**header, "lm_head.weight": {**header["lm_head.weight"], **changes}}
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    return {
        "empty": b"",
        "junk": b"junk" * 500,
        "half": whole[: len(whole) // 2],
        "a byte short": whole[:-1],
        "header alone": whole[: 8 + length],
        "header cut": whole[:300],
        "header too long": struct.pack("<Q", 2**60) + whole[8:],
        "header no object": struct.pack("<Q", 2) + b"[]" + whole[8 + length :],
        "header changed": whole[:200] + b"\xff\x00\xff" + whole[203:],
        "far away": with_entry(data_offsets=[10**9, 10**9 + 131072]),
        "before the start": with_entry(data_offsets=[-4, 131068]),
        "unknown type": with_entry(dtype="X9"),
        "vast": with_entry(shape=[10**9, 10**9]),
        "no shape": with_entry(shape=None),
    }


@pytest.mark.parametrize(
    ("form", "damage"), [("npz", damage_npz), ("safetensors", damage_safetensors)]
)
def test_damaged_weights_are_one_line_and_never_end_the_process(
    tmp_path: Path, form: str, damage: Callable[[Path], dict[str, bytes]]
) -> None:
    whole = write_model(tmp_path / "m", form=form)
    name = weights_of(whole).name
    config = (whole / "config.json").read_bytes()
    cases = damage(weights_of(whole))
    for case, content in cases.items():
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").write_bytes(config)
        (tmp_path / case / name).write_bytes(content)
    command = [sys.executable, "-c", READ, *(str(tmp_path / case) for case in cases)]
    root = ROOT
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = dict(zip(cases, result.stdout.splitlines(), strict=True))
    for case, line in lines.items():
        assert f"{tmp_path / case / name} is damaged or incomplete: " in line, (case, line)
        assert "\\n" not in line


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights_of(folder).unlink()
    assert "has no weights: none of model*.safetensors, weights*.npz" in refusal(read_model, folder)


def test_weights_that_are_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", form="npz")
    weights_of(folder).unlink()
    (folder / "weights.npz").mkdir()
    assert "weights.npz" in refusal(read_model, folder)


@pytest.mark.parametrize("content", ["", "{", "\xff", "nul"])
def test_a_broken_config_is_named(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert f"{folder / 'config.json'} is not valid JSON" in refusal(read_model, folder)


@pytest.mark.parametrize("content", ["[]", "5", '"llama"', "null"])
def test_a_config_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "not a JSON object" in refusal(read_json_file, tmp_path / "config.json")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    assert refusal(read_model, tmp_path) == f"{tmp_path / 'config.json'} is missing"


def test_a_config_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert str(tmp_path / "config.json") in refusal(read_model, tmp_path)


def test_a_config_without_model_type_is_refused() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert "no model_type" in refusal(build_model, config)


@pytest.mark.parametrize(
    "name", ["lama", "", "cache", "base", "llama.x", "../llama", None, 5, ["llama"], {"a": 1}]
)
def test_an_unknown_architecture_is_named(name: Any) -> None:
    text = refusal(build_model, {**LLAMA, "model_type": name})
    assert f"unknown architecture {name!r}" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", -1),
        ("hidden_size", None),
        ("hidden_size", 2**40),
        ("num_attention_heads", 0),
        ("num_hidden_layers", "x"),
        ("vocab_size", 0),
        ("rope_scaling", {"type": "nope"}),
        ("rope_scaling", 5),
    ],
)
def test_a_config_that_describes_no_model_is_refused(key: str, value: Any) -> None:
    text = refusal(build_model, {**LLAMA, key: value})
    assert "config.json does not describe a llama: " in text


def test_what_a_config_lacks_is_named() -> None:
    text = refusal(build_model, {"model_type": "llama"})
    assert "hidden_size" in text and "vocab_size" in text


@pytest.mark.parametrize("quantization", [5, {}, {"group_size": 32}, {"bits": 4}, None, "x"])
def test_a_bad_quantization_is_named(tmp_path: Path, quantization: Any) -> None:
    folder = change_config(write_model(tmp_path / "m", bits=4), quantization=quantization)
    assert f"bad quantization {quantization!r}" in refusal(read_model, folder)


def test_the_rotary_settings_of_transformers_5_are_taken(tmp_path: Path) -> None:
    """`rope_parameters` instead of `rope_theta`; mlx-lm's llama knows the latter alone."""
    old = write_model(tmp_path / "old", {**LLAMA, "rope_theta": 500.0})
    new = shutil.copytree(old, tmp_path / "new")
    config = json.loads((new / "config.json").read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    (new / "config.json").write_text(json.dumps(config))
    tokens = mx.array([[1, 5, 9, 300, 7]])
    expected, found = (read_model(folder)[0](tokens) for folder in (old, new))
    assert mx.array_equal(expected, found).item()


def test_an_architecture_that_skips_the_constructor_of_modules_is_a_module() -> None:
    model = build_model(read_configs()["recurrent_gemma"])
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())
