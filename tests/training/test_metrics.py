import io
import json
import math
import re
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.errors import InputError
from graft.training.evaluate import Evaluation
from graft.training.metrics import RunLog

import pytest
from rich.console import Console

TRAIN = {
    "loss": 1.5,
    "tokens": 1234,
    "tokens_per_second": 5678.9,
    "learning_rate": 1e-4,
    "grad_norm": 0.25,
}


def plain() -> Console:
    """A console as of a pipe or a file."""
    return Console(file=io.StringIO(), highlight=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_training_line_has_these_keys_and_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        log.train(3, **TRAIN)
    (line,) = lines(path)
    assert list(line) == [
        "kind",
        "step",
        "loss",
        "tokens",
        "tokens_per_second",
        "learning_rate",
        "grad_norm",
        "peak_memory_bytes",
        "seconds",
    ]
    assert {key: line[key] for key in TRAIN} == TRAIN
    assert (line["kind"], line["step"]) == ("train", 3)
    assert isinstance(line["peak_memory_bytes"], int)


def test_an_evaluation_line_has_these_keys_and_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        log.evaluation(5, "valid", Evaluation(loss=2.0, tokens=77, seconds=0.5))
        log.evaluation(10, "test", Evaluation(loss=1.0, tokens=78, seconds=0.5))
    first, second = lines(path)
    assert list(first) == ["kind", "split", "step", "loss", "perplexity", "tokens", "seconds"]
    assert first["perplexity"] == pytest.approx(7.38905609893065)  # e^2
    assert [first[key] for key in ("kind", "split", "step", "loss", "tokens")] == [
        "eval",
        "valid",
        5,
        2.0,
        77,
    ]
    assert (second["split"], second["step"]) == ("test", 10)


def test_an_event_line_has_its_details(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        log.event(4, "saved", file="a.npz")
    (line,) = lines(path)
    assert list(line) == ["kind", "step", "event", "file", "seconds"]
    assert (line["kind"], line["step"], line["event"], line["file"]) == (
        "event",
        4,
        "saved",
        "a.npz",
    )


def test_each_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        for count in range(1, 4):
            log.event(count, "saved")
            assert len(lines(path)) == count
            assert path.read_text().endswith("\n")


def test_a_run_that_fails_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError), RunLog(path, 10, plain()) as log:
        log.event(1, "saved")
        raise RuntimeError
    assert len(lines(path)) == 1


@pytest.mark.parametrize("torn", [b"", b'{"kind": "ev', b"\0\0\0\0", b"\0\0\n", b'{"a"\n{"b": 1'])
def test_a_line_that_a_crash_tore_is_dropped(tmp_path: Path, torn: bytes) -> None:
    """The next one is not glued to it, however much of the file the checkpoint knows of."""
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        log.event(1, "first")
        log.event(2, "second")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with RunLog(path, 10, plain(), resume_at=10**9) as log:
        log.event(3, "third")
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(whole)
    path.write_bytes(whole[:-5])
    with RunLog(path, 10, plain(), resume_at=len(whole)) as log:
        log.event(2, "second again")
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_seconds_count_from_the_start_and_do_not_go_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        for step in range(3):
            log.event(step, "saved")
        upper = log.seconds
    seconds = [line["seconds"] for line in lines(path)]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0 and seconds[-1] <= upper + 0.001


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1000.0])
def test_what_json_cannot_hold_is_null(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, 10, plain()) as log:
        log.evaluation(1, "valid", Evaluation(loss=loss, tokens=1, seconds=0.0))
        log.train(1, **{**TRAIN, "loss": loss, "grad_norm": math.nan})
    evaluation, training = lines(path)
    assert evaluation["perplexity"] is None
    assert evaluation["loss"] == training["loss"] == (1000.0 if loss == 1000.0 else None)
    assert training["grad_norm"] is None


def test_perplexity_is_e_to_the_loss_and_infinite_beyond_floats() -> None:
    assert Evaluation(loss=0.0, tokens=1, seconds=0.0).perplexity == 1.0
    assert Evaluation(loss=1000.0, tokens=1, seconds=0.0).perplexity == math.inf


def test_without_a_terminal_reports_are_plain_lines() -> None:
    console = plain()
    with RunLog(None, 10, console) as log:
        for step in range(1, 11):
            log.step(step)
        log.train(10, **TRAIN)
        log.evaluation(10, "valid", Evaluation(loss=2.0, tokens=1234, seconds=0.5))
    text = shown(console)
    assert "\x1b" not in text and "\r" not in text
    first, second = text.splitlines()
    assert "step    10" in first and "loss 1.500" in first and "5,679 tokens/s" in first
    assert "valid loss 2.000" in second and "7.39" in second and "1,234 tokens" in second


def test_lines_are_not_broken_at_the_width_of_the_console() -> None:
    console = Console(file=io.StringIO(), width=20, highlight=False)
    with RunLog(None, 10, console) as log:
        log.train(10, **TRAIN)
    assert len(shown(console).splitlines()) == 1


def test_on_a_terminal_a_live_line_shows_where_the_run_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    with RunLog(None, 10, console) as log:
        log.step(7)
        log.train(7, **TRAIN)
        log.step(8)
    text = shown(console)
    assert "8/10" in text and "loss 1.500" in text and "tokens/s" in text
    assert re.search(r"tokens/s +[\d.]+ [kMG]?B", text)
    assert "\x1b" in text


def test_text_in_brackets_is_printed_as_it_is() -> None:
    console = plain()
    with RunLog(None, 10, console) as log:
        log.say("[bold]not markup[/bold]")
    assert shown(console) == "[bold]not markup[/bold]\n"


def test_without_a_place_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, 10, plain()) as log:
        log.event(1, "saved")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a" / "b" / "metrics.jsonl", 10, plain()) as log:
        log.event(1, "saved")
    assert len(lines(tmp_path / "a" / "b" / "metrics.jsonl")) == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "metrics.jsonl"
    with pytest.raises(InputError, match=f"cannot write {path}: "), RunLog(path, 10, plain()):
        pass
