"""Hugging Face's layout, on disk and from the Hub."""

from pathlib import Path

from graft.errors import InputError
from graft.pretrained.hugging_face import open_hugging_face_folder, weight_files, with_rope_settings

import numpy as np
import pytest

from support import tiny, torch_zip


def test_shards_of_both_kinds_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for index, name in enumerate(("a", "b")):
        path = tmp_path / f"pytorch_model-0000{index + 1}-of-00002.bin"
        torch_zip.save(path, {name: np.zeros(3, np.float32)})
    index_file = tmp_path / "pytorch_model.bin.index.json"
    files = ", ".join(f'"{i}": "{file.name}"' for i, file in enumerate(weight_files(tmp_path)))
    index_file.write_text('{"weight_map": {' + files + "}}")
    _, tensors = open_hugging_face_folder(tmp_path)
    assert set(tensors) == {"a", "b"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="lacks pytorch_model-00002-of-00002"):
        weight_files(tmp_path)
    index_file.write_text("{}")
    with pytest.raises(InputError, match="has no weight_map"):
        weight_files(tmp_path)


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
