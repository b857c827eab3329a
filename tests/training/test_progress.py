"""Counts and scores of a run, and what the loop makes of them: best adapter, end, bad steps."""

import json
import math
from pathlib import Path
from typing import Any

import lora
from graft.training.evaluate import Evaluation
from graft.training.objectives import sft
from graft.training.progress import Progress, ReportWindow
from graft.training.run import Run
from graft.training.step import StepResult, UpdateStep

import mlx.core as mx
import numpy as np
import pytest

from support.tiny import LLAMA, TEXTS, write_model, write_rows


def test_a_window_weighs_losses_by_tokens() -> None:
    progress = Progress()
    progress.add(StepResult(loss=2.0, tokens=30, grad_norm=0.5, finite=True), seconds=1.0)
    progress.add(StepResult(loss=4.0, tokens=10, grad_norm=0.7, finite=True), seconds=2.0)
    assert progress.window == ReportWindow(loss_sum=100.0, tokens=40, grad_norm=0.7, seconds=3.0)
    assert (progress.window.loss, progress.tokens) == (2.5, 40)


def test_a_bad_step_is_counted_and_its_numbers_are_not() -> None:
    progress = Progress()
    good, bad = (StepResult(2.0, 10, 0.5, True), StepResult(math.nan, 10, math.inf, False))
    for result, in_a_row in ((good, 0), (bad, 1), (bad, 2), (good, 0), (bad, 1)):
        progress.add(result, seconds=1.0)
        assert progress.nonfinite_steps == in_a_row
    assert (progress.tokens, progress.window.loss, progress.window.grad_norm) == (20, 2.0, 0.5)


def test_a_window_of_nonfinite_steps_has_no_loss() -> None:
    progress = Progress()
    progress.add(StepResult(math.nan, 10, math.nan, False), seconds=1.0)
    assert math.isnan(progress.window.loss)


def test_only_a_lower_loss_is_better_and_what_is_no_number_never() -> None:
    progress = Progress()
    scores = [(math.nan, False), (3.0, True), (3.0, False), (2.5, True), (math.nan, False)]
    for number, (loss, better) in enumerate(scores, 1):
        progress.step = number
        assert progress.record_validation(loss) == better
    assert (progress.best_loss, progress.best_step, progress.stale_evaluations) == (2.5, 4, 1)


@pytest.mark.parametrize("patience, stale", [(0, False), (1, True), (2, True), (3, False)])
def test_two_validations_without_a_better_one(patience: int, stale: bool) -> None:
    progress = Progress()
    for loss in (2.0, 2.1, 2.2):
        progress.record_validation(loss)
    assert progress.is_stale(patience) == stale


def test_a_record_makes_the_same_progress_again() -> None:
    progress = Progress(
        step=7, tokens=100, best_loss=0.1 + 0.2, window=ReportWindow(1 / 3, 2, 0.1, 4.0)
    )
    assert Progress.from_record(json.loads(json.dumps(progress.record()))) == progress


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and data: 16 rows for training, 4 for validation."""
    write_model(tmp_path / "model", {**LLAMA, "num_hidden_layers": 1})
    write_rows(tmp_path / "data", train=TEXTS * 4, valid=TEXTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str, name: str = "run") -> int:
    """`lora.py --train`: four steps to an epoch."""
    where = ["--model", "model", "--data", "data", "--adapter-file", f"{name}/adapters.npz"]
    return lora.main(["--train", *where, "--learning-rate", "1e-2", *arguments])


def lines(name: str = "run", **wanted: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have these values."""
    read = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    return [line for line in read if wanted.items() <= line.items()]


def tensors(name: str, file: str = "adapters.npz") -> dict[str, bytes]:
    return {n: np.array(a).tobytes() for n, a in mx.load(str(Path(name, file))).items()}


def score(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the validations have these losses, after that of the base model."""
    coming = iter([9.0, *losses])

    def evaluate(*given: Any, **named: Any) -> Evaluation:
        return Evaluation(next(coming), 10, 0.1)

    monkeypatch.setattr(lora, "evaluate_split", evaluate)


def test_the_best_adapter_is_the_one_that_a_shorter_run_ends_with(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score(monkeypatch, [3.0, 2.0, 2.5])
    assert train("--iters", "6", "--steps-per-eval", "2") == 0
    assert "best validation loss 2.000 at step 4: run/adapters.best.npz" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train("--iters", "4", name="short") == 0
    assert tensors("run", "adapters.best.npz") == tensors("short") != tensors("run")


def test_early_stop_ends_after_so_many_validations_without_a_better_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score(monkeypatch, [3.0, 2.0, 2.0, 2.5, 1.0])
    arguments = ("--iters", "50", "--steps-per-eval", "2", "--save-every", "50")
    assert train(*arguments, "--early-stop", "2") == 0
    said = capsys.readouterr().out
    assert "stopped: 2 validations without improvement" in said
    assert [line["step"] for line in lines(kind="eval")] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in lines(event="saved")] == [8]
    resume = ["--resume", "--adapter-file", "run/adapters.npz"]
    assert lora.main(resume) == 0
    assert "this run is finished: 8 of 50 steps are done" in capsys.readouterr().out
    # With more patience it goes on.
    score(monkeypatch, [])
    monkeypatch.setattr(lora, "evaluate_split", lambda *given, **named: Evaluation(1.0, 10, 0.1))
    assert lora.main([*resume, "--early-stop", "3", "--iters", "10"]) == 0
    assert lines(kind="eval")[-1]["step"] == 10


@pytest.mark.parametrize("epochs, steps", [("1", 4), ("2.5", 10), ("0.1", 1)])
def test_epochs_are_so_many_times_over_the_data(here: Path, epochs: str, steps: int) -> None:
    assert train("--epochs", epochs, "--steps-per-report", "1") == 0
    assert lines(kind="train")[-1]["step"] == steps
    assert lines(event="saved")[-1]["step"] == steps


@pytest.mark.parametrize("wrong", [["--epochs", "2", "--iters", "5"], ["--epochs", "0"]])
def test_epochs_beside_iters_and_none_are_refused(
    here: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*wrong) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: --epochs {float(wrong[1])}: give more than 0, and not --iters with it\n"
    )
    assert not Path("run").exists()


def test_a_run_of_epochs_can_be_continued_by_iters_and_the_other_way_round(here: Path) -> None:
    assert train("--epochs", "1") == 0
    resume = ["--resume", "--adapter-file", "run/adapters.npz"]
    assert lora.main([*resume, "--iters", "6"]) == 0
    assert lines(event="saved")[-1]["step"] == 6
    assert lora.main([*resume, "--epochs", "2"]) == 0
    assert lines(event="saved")[-1]["step"] == 8


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_a_batch_train_and_validate(here: Path, rows: int) -> None:
    write_rows(Path("data"), train=TEXTS[:rows], valid=TEXTS[:rows], test=TEXTS[:rows])
    assert train("--iters", "3", "--batch-size", "8", "--test", "--steps-per-report", "1") == 0
    seen = lines(kind="eval", split="valid")[0]["tokens"]
    assert [line["tokens"] for line in lines(kind="train")] == [seen, 2 * seen, 3 * seen]
    assert lines(split="test")[0]["tokens"] == seen


def poison(monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    """Make losses of training no number where `bad` says so of a step counted from 1."""
    take, compute, now = lora.take_step, sft.objective, []

    def noting(run: Run, batches: Any) -> Any:
        now.append(run.progress.step + 1)
        return take(run, batches)

    def failing(model: Any, batch: Any) -> Any:
        total, tokens, metrics = compute(model, batch)
        # There is a dry run before the first step.
        poisoned = model.training and now and bad(now)
        return (total * mx.nan if poisoned else total), tokens, metrics

    monkeypatch.setattr(lora, "take_step", noting)
    monkeypatch.setattr(sft, "objective", failing)
    # A compiled step would ask only once.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


OFTEN = ("--iters", "12", "--save-every", "4", "--steps-per-report", "1", "--steps-per-eval", "4")


def test_a_bad_step_changes_nothing_and_is_logged_with_its_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda steps: steps[-1] == 5)
    saved: dict[int, dict[str, mx.array]] = {}
    take = lora.take_step

    def keeping(run: Run, batches: Any) -> Any:
        result = take(run, batches)
        arrays = run.update.state().items()
        saved[run.progress.step] = {name: np.array(array).tobytes() for name, array in arrays}
        return result

    monkeypatch.setattr(lora, "take_step", keeping)
    assert train(*OFTEN) == 0
    assert saved[4] == saved[5] != saved[6]
    (bad,) = lines(event="bad_step")
    assert (bad["step"], bad["loss"], len(bad["rows"])) == (5, None, 4)
    assert set(bad["rows"]) < set(range(16))
    said = capsys.readouterr().out
    assert "step     5  skipped, not finite: loss nan" in said
    assert f"rows {bad['rows']}" in said
    reports = {line["step"]: line for line in lines(kind="train")}
    assert reports[5]["loss"] is None and reports[5]["tokens"] == reports[4]["tokens"]
    assert not lines(event="went_back")


def test_after_too_many_the_last_checkpoint_is_restored_with_half_the_rate(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 6, 7 and 8 fail the first time: back to step 4, and through."""
    poison(monkeypatch, lambda steps: len(steps) in (6, 7, 8))
    assert train(*OFTEN, "--max-nonfinite-steps", "3") == 0
    assert [line["step"] for line in lines(event="bad_step")] == [6, 7, 8]
    (back,) = lines(event="went_back")
    assert (back["step"], back["to_step"]) == (8, 4)
    assert "rolled back to step 4, learning rate halved" in capsys.readouterr().out
    steps = [line["step"] for line in lines(kind="train")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, *range(5, 13)]
    rates = [line["learning_rate"] for line in lines(kind="train")]
    assert rates == pytest.approx([1e-2] * 7 + [5e-3] * 8)
    # Nothing is told or measured twice because of it.
    assert [line["step"] for line in lines(kind="eval")] == [0, 4, 8, 12]
    assert [line["step"] for line in lines(event="saved")] == [4, 8, 12]


def test_after_going_back_in_vain_the_run_ends_and_says_what_was_seen(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda steps: steps[-1] > 5)
    assert train(*OFTEN, "--max-nonfinite-steps", "3") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(
        "error: 3 steps in a row up to step 8 were not finite, even after rolling"
    )
    assert "loss nan, gradient norm nan, rows [" in told
    assert "run/adapters.npz holds the last good adapter" in told
    assert [line["step"] for line in lines(event="bad_step")] == [6, 7, 8, 6, 7, 8]
    assert len(lines(event="went_back")) == 1
    monkeypatch.undo()
    monkeypatch.chdir(here)
    # The last good adapter is that of step 5, which was made with half the rate.
    assert all(np.isfinite(np.array(a)).all() for a in mx.load("run/adapters.npz").values())
    assert tensors("run") != tensors("run", "adapters.best.npz")
    assert lora.main(["--resume", "--adapter-file", "run/adapters.npz"]) == 0
    assert lines(event="saved")[-1]["step"] == 12


def test_failing_from_the_first_step_leaves_the_untrained_adapter(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda steps: True)
    assert train(*OFTEN, "--max-nonfinite-steps", "2") == 1
    halves = mx.load("run/adapters.npz")
    assert all((np.array(a) == 0).all() for n, a in halves.items() if n.endswith("lora_b"))


@pytest.mark.parametrize("rate", ["1e20", "1e38"])
def test_an_adapter_that_a_step_ruined_is_not_saved(
    here: Path, rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of that step is finite: it is that of the adapter before."""
    often = ("--iters", "4", "--save-every", "1", "--steps-per-report", "1")
    assert train(*often, "--learning-rate", rate) == 1
    told = capsys.readouterr().err
    assert "the loss of the adapter after step 1 is not finite" in told
    assert "run/adapters.npz holds the last good adapter" in told
    assert not lines(event="saved") and len(lines(event="bad_adapter")) == 2
    checkpoints = list(Path("run/checkpoints").glob("0*"))
    assert [path.name for path in checkpoints] == ["0000000"]
    halves = mx.load("run/adapters.npz")
    assert all((np.array(a) == 0).all() for n, a in halves.items() if n.endswith("lora_b"))


def test_an_adapter_that_was_ruined_after_a_save_is_rolled_back(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 is taken at 1e20 once: the next save finds it and goes back to step 4."""
    rates = iter([1e-2] * 5 + [1e20])
    set_rate = lora.set_learning_rate

    def setting(optimizer: Any, rate: float, **named: Any) -> None:
        set_rate(optimizer, next(rates, rate), **named)

    monkeypatch.setattr(lora, "set_learning_rate", setting)
    assert train("--iters", "8", "--save-every", "2", "--steps-per-report", "1") == 0
    assert [line["step"] for line in lines(event="saved")] == [2, 4, 6, 8]
    (back,) = lines(event="went_back")
    assert (back["step"], back["to_step"]) == (6, 4)
    assert lines(kind="train")[-1]["learning_rate"] == pytest.approx(5e-3)


def test_needless_traces_are_told_once_and_all_of_them_at_the_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: two shapes, each traced once more for no reason from the third step on."""
    asked: list[int] = []

    def traces(update: UpdateStep) -> tuple[int, int]:
        asked.append(len(asked))
        return (2 if len(asked) < 3 else 4), 2

    monkeypatch.setattr(UpdateStep, "traces", property(traces))
    train("--iters", "6", "--steps-per-report", "1")
    events = [line for line in lines() if line["kind"] == "event" and "traces" in line]
    assert [(e["event"], e["step"], e["traces"], e["needed"]) for e in events] == [
        ("retraced", 3, 4, 2),
        ("traced", 6, 4, 2),
    ]
    said = capsys.readouterr().out
    assert said.count("slow: compiled 4 times instead of 2") == 1
    assert "\ncompiled 4 times, 2 needed\n" in said
