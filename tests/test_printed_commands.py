"""Every command that a command prints works as it is printed."""

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import convert
import lora
from graft.__main__ import main as graft

import pytest

from support.tiny import LLAMA, TEXTS, write_model, write_rows

PRINTED = re.compile(
    r"(?:^ *|: |`)((?:python (?:-m graft|lora\.py|convert\.py)|graft) [^`\n]+)", re.MULTILINE
)
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "python -m graft ": graft,
    "python lora.py ": lora.main,
    "python convert.py ": convert.main,
    "graft ": graft,
}
MODEL = "a model"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model and data, all of whose names have spaces."""
    monkeypatch.chdir(tmp_path)
    write_model(Path(MODEL), {**LLAMA, "num_hidden_layers": 1})
    write_rows(Path("my data"), train=TEXTS, valid=TEXTS, test=TEXTS)


def run(command: str) -> int:
    program = next(name for name in PROGRAMS if command.startswith(name))
    return PROGRAMS[program](shlex.split(command.removeprefix(program)))


def run_printed(text: str, *, count: int) -> list[str]:
    """Run all commands in a text; returns them."""
    commands = PRINTED.findall(text)
    assert len(commands) == count, text
    for command in commands:
        assert run(command) == 0, command
    return commands


TRAIN = ["--train", "--model", MODEL, "--data", "my data", "--adapter-file", "my run/a.npz"]
TRAIN += ["--iters", "2", "--batch-size", "1"]


def test_those_after_training(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in TEXTS)
    for name in ("train", "valid", "test"):
        Path(f"my data/{name}.jsonl").write_text(rows)
    chosen = ["--max-seq-length", "40", "--mask-prompt"]
    assert lora.main([*TRAIN, "--test", *chosen]) == 0
    said = capsys.readouterr().out
    evaluate, _ = run_printed(said, count=2)
    assert all(text in evaluate for text in ("'my data'", *chosen))
    losses = re.findall(r"test loss [\d.]+", said + capsys.readouterr().out)
    assert len(losses) == 2 and losses[0] == losses[1], "it evaluates something else"


def test_there_is_none_for_data_without_a_test_split(capsys: pytest.CaptureFixture[str]) -> None:
    os.remove("my data/test.jsonl")
    assert lora.main(TRAIN) == 0
    (command,) = run_printed(capsys.readouterr().out, count=1)
    assert command.endswith("--prompt TEXT")


def test_those_for_a_run_that_was_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = lora.take_step

    def stop_after(*arguments: Any) -> Any:
        result = step(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(lora, "take_step", stop_after)
    assert lora.main(TRAIN) == 130
    stopped = capsys.readouterr().out
    assert lora.main(TRAIN) == 2
    refused = capsys.readouterr().err
    monkeypatch.setattr(lora, "take_step", step)
    assert PRINTED.findall(stopped) == PRINTED.findall(refused)
    run_printed(stopped, count=1)


def test_that_for_the_weights_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    import mlx.core as mx
    import numpy as np

    arrays = mx.load(f"{MODEL}/model.safetensors")
    assert isinstance(arrays, dict)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    torch.save(tensors, f"{MODEL}/pytorch_model.bin")
    os.remove(f"{MODEL}/model.safetensors")
    assert graft(["targets", "--model", MODEL]) == 2
    run_printed(capsys.readouterr().err, count=1)
    assert Path("mlx_model/config.json").is_file()


def test_that_in_the_card_of_a_dataset() -> None:
    assert graft(["dataset", "json", "--out", "a set/json docs"]) == 0
    before = Path("a set/json docs/train.jsonl").read_bytes()
    card = Path("a set/json docs/README.md").read_text()
    shutil.rmtree("a set")
    run_printed(card, count=1)
    assert Path("a set/json docs/train.jsonl").read_bytes() == before
