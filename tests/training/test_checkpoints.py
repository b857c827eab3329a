"""A run that is killed at any moment and resumed ends as the uninterrupted one does."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import lora
from graft.training.run import Run

import pytest
import yaml

from support.paths import ROOT
from support.tiny import LLAMA, TEXTS, write_model, write_rows

# Everything whose state a checkpoint must hold is switched on.
OPTIONS = shlex.split("""
--iters 24 --batch-size 2 --grad-accumulation-steps 2 --learning-rate 1e-2 --dropout 0.2
--optimizer adamw --weight-decay 0.1 --lr-schedule cosine --warmup-steps 7 --grad-clip 1
--lora-plus-ratio 4 --steps-per-report 3 --steps-per-eval 8 --save-every 5 --seed 3
""")
CHANGING = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a dataset whose last batch of an epoch is partial."""
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model", {**LLAMA, "num_hidden_layers": 1}, bits=4)
    write_rows(folder / "data", train=[f"{t} {n}" for t in TEXTS for n in range(6)], valid=TEXTS)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    assert lora.main(arguments(place, "whole")) == 0
    return place / "whole"


def arguments(place: Path, name: str) -> list[str]:
    model, data = str(place / "model"), str(place / "data")
    adapter = str(place / name / "adapters.npz")
    return ["--train", "--model", model, "--data", data, "--adapter-file", adapter, *OPTIONS]


def resuming(place: Path, name: str) -> list[str]:
    return ["--resume", "--adapter-file", str(place / name / "adapters.npz")]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """The training run as a separate process."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "lora.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_code(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def wait_for(path: Path, child: "subprocess.Popen[str]", *, newer_than: int = 0) -> None:
    """Until the file is there, with a later time of change than that, or the child has ended."""
    while (not path.exists() or changed(path) <= newer_than) and child.poll() is None:
        time.sleep(0.01)


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


class Killed(BaseException):
    """Stands for the end of a process."""


def stop_at(place: Path, name: str, step: int) -> None:
    """Leave a run as a kill right after the checkpoint of `step` does."""
    save = Run.save_checkpoint

    def saving(run: Run) -> None:
        save(run)
        if run.progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save_checkpoint", saving)
        lora.main(arguments(place, name))


def metrics(folder: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CHANGING} for line in lines]


def options(folder: Path) -> dict[str, object]:
    """The record of the options without those that may differ."""
    record = yaml.safe_load((folder / "run.yaml").read_text())
    free = ("adapter_file", "keep_checkpoints", "force")
    return {name: value for name, value in record.items() if name not in free}


def assert_same_run(one: Path, other: Path) -> None:
    newest = (one / "checkpoints" / "LATEST").read_text().strip()
    arrays = f"checkpoints/{newest}/arrays.safetensors"
    for name in ("adapters.npz", "adapters.best.npz", arrays):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(one) == metrics(other)
    assert options(one) == options(other)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_matches_an_uninterrupted_run(
    place: Path, uninterrupted: Path
) -> None:
    chance = random.Random(os.environ.get("GRAFT_TEST_SEED", "0"))
    record = place / "killed" / "run.yaml"
    child = start(arguments(place, "killed"))
    wait_for(place / "killed" / "checkpoints" / "LATEST", child)
    kills, before = 0, 0
    while kills < 6 and child.poll() is None:
        # While Python starts or the model loads; or later: in a step, a validation, a save.
        if chance.random() < 0.8:
            wait_for(record, child, newer_than=before)
        time.sleep(chance.uniform(0, 0.2))
        before = changed(record)
        child.kill()
        child.communicate()
        kills += 1
        child = start(resuming(place, "killed"))
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert kills > 1
    assert_same_run(place / "killed", uninterrupted)


SLOW_MOMENTS = [
    pytest.param(m, marks=pytest.mark.slow) for m in ("adapter", "arrays", "latest", "prune")
]


@pytest.mark.parametrize("moment", ["rename", *SLOW_MOMENTS])
def test_killed_while_saving_matches_an_uninterrupted_run(
    place: Path, uninterrupted: Path, moment: str
) -> None:
    name = f"saving-{moment}"
    killed = run_code(KILLED_WHILE_SAVING, moment, *arguments(place, name))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert lora.main(resuming(place, name)) == 0
    assert_same_run(place / name, uninterrupted)


# Kills itself at the third time that a save gets to the chosen point.
KILLED_WHILE_SAVING = """
import os, signal, sys
import graft, lora
from graft.storage import atomic
from graft.training import checkpoints as training_state
from graft.training.run import Run

def deadly(function):
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if sys.argv[1] == "adapter":
    Run.save_checkpoint = deadly(Run.save_checkpoint)
elif sys.argv[1] == "arrays":
    training_state._sha256 = deadly(training_state._sha256)
elif sys.argv[1] == "rename":
    training_state.new_folder = deadly(training_state.new_folder)
    atomic._swap_in = deadly(atomic._swap_in)
elif sys.argv[1] == "latest":
    training_state.new_file = deadly(training_state.new_file)
elif sys.argv[1] == "prune":
    training_state.shutil.rmtree = deadly(training_state.shutil.rmtree)
lora.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(
    place: Path, uninterrupted: Path, number: signal.Signals, status: int
) -> None:
    name = number.name
    child = start(arguments(place, name))
    wait_for(place / name / "checkpoints" / "LATEST", child)
    child.send_signal(number)
    told, errors = child.communicate()
    assert child.returncode == status, errors
    assert " ".join(resuming(place, name)) in told
    assert errors == ""
    assert lora.main(resuming(place, name)) == 0
    assert_same_run(place / name, uninterrupted)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint_good(
    place: Path, uninterrupted: Path
) -> None:
    killed = run_code(TWO_SIGNALS, *arguments(place, "twice"))
    assert killed.returncode == -signal.SIGINT, killed.stderr
    assert lora.main(resuming(place, "twice")) == 0
    assert_same_run(place / "twice", uninterrupted)


# The second one comes while the save after the first is under way.
TWO_SIGNALS = """
import os, signal, sys
import graft, lora
from graft.training import checkpoints as training_state

def interrupt(function):
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (3, 4):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)
    return call

training_state._sha256 = interrupt(training_state._sha256)
lora.main(sys.argv[1:])
"""


def test_a_finished_run_says_so(
    place: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    assert lora.main(resuming(place, "whole")) == 0
    told = capsys.readouterr().out
    assert "this run is finished: 24 of 24 steps are done" in told
    assert "best validation loss" in told
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


def test_the_same_command_gives_the_same_bits(place: Path, uninterrupted: Path) -> None:
    assert lora.main(arguments(place, "again")) == 0
    assert_same_run(place / "again", uninterrupted)


def test_the_saved_options_run_again_as_they_are(place: Path, uninterrupted: Path) -> None:
    record, adapter = str(uninterrupted / "run.yaml"), str(place / "record" / "adapters.npz")
    assert lora.main(["--config", record, "--adapter-file", adapter]) == 0
    assert_same_run(place / "record", uninterrupted)


@pytest.mark.parametrize("file", ["arrays.safetensors", "state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(
    place: Path, uninterrupted: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"damaged-{file}"
    stop_at(place, name, 20)
    newest = place / name / "checkpoints" / "0000020"
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2] + b"?" * (len(content) // 2))
    assert lora.main(resuming(place, name)) == 0
    told = capsys.readouterr().err
    assert f"note: {newest}: " in told
    assert "using step 15" in told
    assert_same_run(place / name, uninterrupted)


def test_resuming_with_other_options_refuses_them_by_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(place, "options", 10)
    changes = ["--learning-rate", "0.5", "--optimizer", "lion", "--iters", "80"]
    assert lora.main([*resuming(place, "options"), *changes]) == 2
    told = capsys.readouterr().err
    for named in ("--learning-rate 0.5", "--optimizer lion (the run has adamw)", "--iters 80"):
        assert named in told
    assert lora.main([*resuming(place, "options"), "--batch-size", "4"]) == 2
    assert "--batch-size 4 (the run has 2)" in capsys.readouterr().err


def test_resuming_with_harmless_changes_goes_on_and_says_them(
    place: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(place, "harmless", 10)
    assert lora.main([*resuming(place, "harmless"), "--keep-checkpoints", "3"]) == 0
    assert "changed: --keep-checkpoints 3 (the run has 2)" in capsys.readouterr().out
    assert_same_run(place / "harmless", uninterrupted)


@pytest.mark.slow
def test_more_iterations_of_a_finished_run_go_on(place: Path) -> None:
    constant = ["--lr-schedule", "constant"]
    assert lora.main([*arguments(place, "longer"), *constant]) == 0
    assert lora.main([*resuming(place, "longer"), "--iters", "29"]) == 0
    assert lora.main([*arguments(place, "long"), *constant, "--iters", "29"]) == 0
    assert (place / "longer" / "adapters.npz").read_bytes() == (
        place / "long" / "adapters.npz"
    ).read_bytes()


def test_resuming_on_other_data_or_another_model_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(place, "other", 10)
    write_rows(place / "data2", train=TEXTS * 6, valid=TEXTS)
    write_model(place / "model2", {**LLAMA, "num_hidden_layers": 1}, bits=4, seed=1)
    resume = resuming(place, "other")
    assert lora.main([*resume, "--data", str(place / "data2")]) == 2
    assert "train data" in capsys.readouterr().err
    assert lora.main([*resume, "--model", str(place / "model2")]) == 2
    assert "the model" in capsys.readouterr().err
    assert (place / "other" / "checkpoints" / "0000010").is_dir()


def test_starting_anew_over_an_unfinished_run_needs_force(
    place: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(place, "forced", 10)
    assert lora.main(arguments(place, "forced")) == 2
    assert "--force" in capsys.readouterr().err
    assert lora.main([*arguments(place, "forced"), "--force"]) == 0
    assert_same_run(place / "forced", uninterrupted)


def test_there_is_nothing_to_resume(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main(resuming(place, "nowhere")) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


def test_old_checkpoints_go_and_the_newest_is_named(uninterrupted: Path) -> None:
    folder = uninterrupted / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["0000020", "0000024", "LATEST"]
    assert (folder / "LATEST").read_text() == "0000024\n"
