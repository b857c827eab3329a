"""Adapters of a folder by their names."""

import shutil
from pathlib import Path

from graft.adapters.formats import find_file
from graft.adapters.formats.peft import write_peft
from graft.engine.adapter_folder import find_adapters, load_all
from graft.engine.engine import Engine
from graft.pretrained.base_config import BaseConfig
from graft.pretrained.load import load_model

import pytest

from support.live_server import write_adapter
from support.served import make_adapter
from support.tiny import LLAMA, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _, _ = load_model(write_model(tmp_path / "model"))
    for seed, name in enumerate(("one", "two"), 1):
        write_adapter(tmp_path / "adapters" / name, model, "q_proj", 4, seed)
    return tmp_path


def test_a_folder_of_adapters_and_a_run_s_own_folder_are_told_apart(folder: Path) -> None:
    place = folder / "adapters"
    (place / "notes").mkdir()
    (place / "README.md").write_text("no adapter")
    assert find_adapters(place) == {"one": place / "one", "two": place / "two"}
    assert find_adapters(place / "one") == {"one": place / "one"}
    assert find_adapters(place / "notes") == {}


def test_safetensors_count_before_an_older_file_of_the_same_adapter(folder: Path) -> None:
    """PEFT wrote adapter_model.bin before; folders from the Hub often hold both."""
    both = folder / "adapters" / "both"
    model, _, _ = load_model(folder / "model")
    write_peft(make_adapter(model, targets="q_proj"), both, base=BaseConfig("base", LLAMA))
    (both / "adapter_model.bin").write_bytes(b"not read")
    assert find_file(both) == both / "adapter_model.safetensors"
    assert find_adapters(folder / "adapters")["both"] == both
    assert find_adapters(both) == {"both": both}


def test_a_folder_that_is_left_out_is_reported_with_its_reason(folder: Path) -> None:
    place = folder / "adapters"
    shutil.copy(place / "one" / "adapters.safetensors", place / "one" / "adapter_model.bin")
    model, tokenizer, _ = load_model(folder / "model")
    with Engine(model, tokenizer) as engine:
        lines = load_all(engine, place, limit=4)
    assert lines[0] == "adapter 0: two, rank 4"
    assert lines[1].startswith("not loaded: one: ") and "name one of them" in lines[1]
