"""The examples train with their own configurations, on a tiny model and for a few steps."""

import json
from pathlib import Path

import lora
from graft.engine.engine import Engine
from graft.pretrained.load import load_model

import pytest

from support.paths import ROOT
from support.tiny import write_model

EXAMPLES = sorted((ROOT / "examples").iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", bits=4)


def train(example: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Train by an example's configuration for four steps; returns the lines of its metrics."""
    monkeypatch.chdir(ROOT)
    config, adapter = f"examples/{example}/config.yaml", folder / "docs" / "adapters.npz"
    few = ["--iters", "4", "--steps-per-eval", "4", "--val-batches", "1"]
    paths = ["--model", str(model), "--adapter-file", str(adapter)]
    assert lora.main(["--train", "--config", config, *paths, *few]) == 0
    lines = (adapter.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_a_readme_that_runs_its_configuration(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"python lora.py --train --config examples/{folder.name}/config.yaml" in text


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_an_example_trains(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = train(folder.name, model, tmp_path, monkeypatch)
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_served_example_answers_beside_the_base(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("qlora-and-serve", model, tmp_path, monkeypatch)
    base, tokenizer, _ = load_model(model)
    with Engine(base, tokenizer) as engine:
        engine.load_adapter("docs", tmp_path / "docs")
        adapted = engine.generate("Q: What is relu?", adapters={"docs": 1.0}, max_tokens=8)
        assert len(adapted.tokens) and len(engine.generate("Q:", max_tokens=8).tokens)
