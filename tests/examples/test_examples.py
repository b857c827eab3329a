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
each_example = pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", bits=4)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a short run of each example."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--iters", "4", "--steps-per-eval", "4", "--val-batches", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for example in EXAMPLES:
            config = f"examples/{example.name}/config.yaml"
            adapter = folder / example.name / "adapters.npz"
            paths = ["--model", str(model), "--adapter-file", str(adapter)]
            assert lora.main(["--train", "--config", config, *paths, *few]) == 0
    return {example.name: folder / example.name for example in EXAMPLES}


@each_example
def test_an_example_has_a_readme_that_runs_its_configuration(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"python lora.py --train --config examples/{folder.name}/config.yaml" in text


@each_example
def test_an_example_trains(folder: Path, runs: dict[str, Path]) -> None:
    lines = (runs[folder.name] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["kind"] == "eval"]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_served_example_answers_beside_the_base(runs: dict[str, Path], model: Path) -> None:
    base, tokenizer, _ = load_model(model)
    with Engine(base, tokenizer) as engine:
        engine.load_adapter("docs", runs["qlora-and-serve"])
        adapted = engine.generate("Q: What is relu?", adapters={"docs": 1.0}, max_tokens=8)
        assert len(adapted.tokens) and len(engine.generate("Q:", max_tokens=8).tokens)
