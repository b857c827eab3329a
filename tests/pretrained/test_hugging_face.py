"""Hugging Face's layout, on disk and from the Hub."""

import json
import math
from pathlib import Path

import convert
from graft.errors import InputError
from graft.pretrained.base_config import read_base_config
from graft.pretrained.folder import read_folder
from graft.pretrained.hugging_face import (
    open_hugging_face_folder,
    read_hugging_face_config,
    weight_files,
    with_older_names,
    with_rope_settings,
)
from graft.pretrained.lazy_model import open_base
from graft.pretrained.load import build_model, load_model, read_model
from graft.storage.lazy_tensors import read

import mlx.core as mx
import numpy as np
import pytest

from support import tiny, torch_zip


def test_shards_of_both_kinds_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for index, name in enumerate(("a", "b")):
        path = tmp_path / f"pytorch_model-0000{index + 1}-of-00002.bin"
        torch_zip.save(path, {name: np.zeros(3, np.float32)})
    index_file = tmp_path / "pytorch_model.bin.index.json"
    files = [file.name for file in weight_files(tmp_path)]
    index_file.write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))
    _, tensors = open_hugging_face_folder(tmp_path)
    assert set(tensors) == {"a", "b"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="lacks pytorch_model-00002-of-00002"):
        weight_files(tmp_path)
    index_file.write_text("{}")
    with pytest.raises(InputError, match="has no weight_map"):
        weight_files(tmp_path)


def write_shards(folder: Path, owners: dict[str, str] | None, **shards: dict[str, float]) -> None:
    """Shards model-NAME.safetensors of vectors that hold one number each."""
    (folder / "config.json").write_text("{}")
    for name, values in shards.items():
        arrays = {tensor: mx.full((2,), value) for tensor, value in values.items()}
        mx.save_safetensors(str(folder / f"model-{name}.safetensors"), arrays)
    if owners is not None:
        weight_map = {tensor: f"model-{shard}.safetensors" for tensor, shard in owners.items()}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))


def both_readings(folder: Path) -> list[dict[str, float]]:
    """The numbers as commands that leave tensors on disk see them, and as loading does."""
    lazy = {name: read(tensor) for name, tensor in open_hugging_face_folder(folder)[1].items()}
    return [{n: a[0].item() for n, a in found.items()} for found in (lazy, read_folder(folder)[1])]


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1", "b": "2"}, **{"1": {"a": 1.0}, "2": {"b": 2.0}})
    write_shards(tmp_path, None, stale={"a": 9.0, "c": 9.0})
    assert both_readings(tmp_path) == [{"a": 1.0, "b": 2.0}] * 2


def test_the_index_says_which_of_two_tensors_counts(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1", "b": "2"}, **{"1": {"a": 1.0}, "2": {"a": 9.0, "b": 2.0}})
    assert both_readings(tmp_path) == [{"a": 1.0, "b": 2.0}] * 2


def test_a_tensor_in_two_files_is_refused_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, None, **{"1": {"a": 1.0}, "2": {"a": 2.0}})
    for reads in (open_hugging_face_folder, read_folder):
        with pytest.raises(InputError, match="several files: a"):
            reads(tmp_path)


def test_a_tensor_that_its_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1", "b": "1"}, **{"1": {"a": 1.0}})
    with pytest.raises(InputError, match="do not hold these: b"):
        read_folder(tmp_path)


def test_safetensors_come_before_pytorch_files(tmp_path: Path) -> None:
    tiny.write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_rotary_settings_of_transformers_5_get_the_names_that_mlx_lm_reads() -> None:
    plain = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert with_rope_settings(plain) == plain | {"rope_theta": 5e5}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}}
    expected = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert with_rope_settings(scaled) == scaled | expected
    nested = {"text_config": plain}
    assert with_rope_settings(nested) == {"text_config": plain | {"rope_theta": 5e5}}
    layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = {"rope_parameters": layers}
    assert with_rope_settings(gemma) == gemma | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}


def test_rotary_settings_that_are_there_stay() -> None:
    both = {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}}
    assert with_rope_settings(both) == both
    assert with_rope_settings({"rope_theta": 1e4}) == {"rope_theta": 1e4}


def test_settings_that_transformers_5_renamed_get_the_names_that_mlx_lm_reads() -> None:
    assert with_older_names({"model_type": "gpt2", "n_positions": 64})["n_ctx"] == 64
    assert with_older_names({"model_type": "gpt2", "n_positions": 64, "n_ctx": 32})["n_ctx"] == 32
    assert with_older_names({"model_type": "glm4_moe"})["rope_scaling"] is None
    assert with_older_names({"model_type": "llama"}) == {"model_type": "llama"}
    assert with_older_names({"model_type": "mamba2"})["intermediate_size"] is None


@pytest.mark.parametrize("mscales", [{}, {"mscale": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.7}])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_the_attention_factor_of_yarn_is_applied(
    tmp_path: Path, name: str, mscales: dict[str, float]
) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 2.0}
    yarn |= {"original_max_position_embeddings": 64, **mscales}
    saved = tiny.LLAMA | {name: yarn}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = build_model(read_hugging_face_config(tmp_path))
    assert model.layers[0].self_attn.rope.mscale == pytest.approx(2.0)


def test_infinity_is_read_as_transformers_5_writes_it(tmp_path: Path) -> None:
    saved = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "other": {"__float__": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    expected = saved | {"time_step_limit": [0.0, math.inf]}
    assert read_hugging_face_config(tmp_path) == expected


@pytest.mark.parametrize(
    "opener", ["export, merge", "fuse, chat, serve", "fuse, extract", "convert"]
)
def test_every_command_reads_the_rotary_settings_of_transformers_5(
    tmp_path: Path, opener: str
) -> None:
    config = {name: value for name, value in tiny.LLAMA.items() if name != "rope_theta"}
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    folder = tiny.write_model(tmp_path / "m", config | {"rope_parameters": rope})
    match opener:
        case "export, merge":
            base = read_base_config(str(folder))
            found, model = base.config, base.model
        case "fuse, chat, serve":
            model, _, found = load_model(folder)
        case "fuse, extract":
            with open_base(folder, tmp_path) as files:
                found, model = files.config, files.model
        case "convert":
            convert.convert(tmp_path / "out", hf_path=folder)
            model, found = read_model(tmp_path / "out")
    assert found["rope_theta"] == 500.0
    assert model.layers[0].self_attn.rope.base == 500.0
