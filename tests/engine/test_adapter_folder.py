"""Adapters of a folder by their names."""

from pathlib import Path

from graft.engine.adapter_folder import find_adapters
from graft.pretrained.load import load_model

import pytest

from support.live_server import write_adapter
from support.tiny import write_model


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
