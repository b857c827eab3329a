"""What is measured, and what it is made from."""

from pathlib import Path

from graft.bench import work as bench_work
from graft.bench.work import MODELS, WORKS, make_materials

import pytest


def test_every_work_has_a_model() -> None:
    assert {work.model for work in WORKS.values()} <= MODELS.keys()


def test_materials_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_work, "stdlib_docstrings", lambda: ["Q: What is a?\nA: b"] * 3)
    monkeypatch.setattr(bench_work, "_make_tokenizer", lambda texts: pytest.fail("made again"))
    (tmp_path / "m10").mkdir()
    make_materials(tmp_path, ["m10"])
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 3
