"""A training process that is killed continues in another process with smaller batches."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lora
from graft.training.supervisor import DIFFERENCE, is_supervised, smaller_batches, supervise

import mlx.core as mx
import pytest
import yaml

from support.paths import ROOT
from support.tiny import LLAMA, TEXTS, write_model, write_rows

# A process that notes its arguments, and ends as the next line of a plan says.
CHILD = """
import os, sys, time
notes, plan = sys.argv[1:3]
with open(notes, "a") as file:
    file.write(" ".join([os.environ["GRAFT_SUPERVISED"], *sys.argv[3:]]) + "\\n")
with open(notes) as file:
    ending = plan.split(",")[len(file.readlines()) - 1]
if ending.startswith("SIG"):
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), getattr(signal, ending))
    time.sleep(60)
sys.exit(int(ending))
"""


def run(folder: Path, plan: str, *, restarts: int, batch_size: int = 4) -> tuple[int, list[str]]:
    """The exit status of a run that ends as planned, and what each process was given."""
    status = supervise(
        [sys.executable, "-I", "-S", "-c", CHILD, str(folder / "notes"), plan],
        lambda: ["--resume"],
        restarts=restarts,
        batch_size=batch_size,
        accumulation=3,
    )
    return status, (folder / "notes").read_text().splitlines()


# 137 is the exit status of a run that lost the process of one of its workers.
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGABRT", "SIGSEGV", "137"])
def test_after_a_death_it_goes_on_with_half_the_rows_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: str
) -> None:
    number = ending.replace("137", "SIGKILL")
    status, given = run(tmp_path, f"{ending},0", restarts=2)
    assert status == 0
    assert given == ["1", "1 --resume --batch-size=2 --grad-accumulation-steps=6"]
    assert capfd.readouterr().err == (
        f"note: the training process was killed by {number}; restart 1 of 2 with 2 rows per batch "
        "and 6 batches per step; it computes the same steps up to rounding, but with --dropout it "
        "drops other inputs than a run without a restart\n"
    )


def test_a_single_row_restarts_as_it_was_and_no_difference_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its bits are those of `--resume`, which are those of an undisturbed run."""
    _, given = run(tmp_path, "SIGKILL,0", restarts=1, batch_size=1)
    assert given[1] == "1 --resume --batch-size=1 --grad-accumulation-steps=3"
    assert capfd.readouterr().err.endswith("1 rows per batch and 3 batches per step\n")


def test_each_restart_halves_again_until_none_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, given = run(tmp_path, "SIGKILL,SIGKILL,SIGKILL,0", restarts=2)
    assert status == 128 + signal.SIGKILL
    assert [line.partition("--batch-size=")[2] for line in given] == [
        "",
        "2 --grad-accumulation-steps=6",
        "1 --grad-accumulation-steps=12",
    ]
    assert capfd.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    "ending, status", [("0", 0), ("2", 2), ("1", 1), ("130", 130), ("143", 143), ("SIGINT", 130)]
)
def test_what_ends_by_itself_or_is_asked_to_is_not_restarted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: str, status: int
) -> None:
    assert run(tmp_path, f"{ending},0", restarts=3)[0] == status
    assert len((tmp_path / "notes").read_text().splitlines()) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("rows", "fewer"),
    [((8, 1), (4, 2)), ((4, 3), (2, 6)), ((5, 1), (1, 5)), ((9, 1), (3, 3)), ((1, 4), (1, 4))],
)
def test_smaller_batches_make_the_same_step(rows: tuple[int, int], fewer: tuple[int, int]) -> None:
    assert smaller_batches(*rows) == fewer


def test_this_process_is_no_child_of_a_supervisor() -> None:
    assert not is_supervised()


OPTIONS = shlex.split("--iters 8 --batch-size 4 --save-every 3 --learning-rate 1e-2 --restarts 2")
# `lora.py`, with steps that take their time. Where it is told to, whole batches end the process
# before the step after the fifth: that stands for what no handler sees.
PROGRAM = """
import os, signal, sys, time
import graft, lora
from graft.training import supervisor

supervisor.COMMAND = [__file__]
take = lora.take_step

def take_or_die(run, batches):
    if "DEADLY" in os.environ and run.progress.step == 5 and run.options.batch_size == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return take(run, batches)

lora.take_step = take_or_die
sys.exit(lora.main())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervise")
    write_model(folder / "model", {**LLAMA, "num_hidden_layers": 1})
    write_rows(folder / "data", train=TEXTS * 4, valid=TEXTS)
    (folder / "program.py").write_text(PROGRAM)
    assert lora.main([*arguments(folder, "whole"), "--restarts", "0"]) == 0
    return folder


def arguments(place: Path, name: str) -> list[str]:
    where = ["--model", str(place / "model"), "--data", str(place / "data")]
    return ["--train", *where, "--adapter-file", str(place / name / "adapters.npz"), *OPTIONS]


def start(place: Path, name: str, **environment: str) -> "subprocess.Popen[str]":
    """A supervised training in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(place / "program.py"), *arguments(place, name)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def adapter(place: Path, name: str) -> dict[str, mx.array]:
    return dict(mx.load(str(place / name / "adapters.npz")))


def test_a_killed_training_ends_where_an_undisturbed_one_does(place: Path) -> None:
    """From the last checkpoint, with half the rows: equal to rounding."""
    # An earlier run, which is finished, is not what the restart goes on with.
    shutil.copytree(place / "whole", place / "killed")
    told, errors = (child := start(place, "killed", DEADLY="1")).communicate()
    assert child.returncode == 0, errors
    assert errors == (
        "note: the training process was killed by SIGKILL; restart 1 of 2 with 2 rows per batch "
        f"and 2 batches per step{DIFFERENCE}\n"
    )
    assert "changed: --batch-size 2 (the run has 4)" in told
    assert "resuming after step 3" in told
    expected = adapter(place, "whole")
    for name, array in adapter(place, "killed").items():
        largest = mx.abs(expected[name]).max().item()
        assert mx.abs(array - expected[name]).max().item() <= 1e-3 * largest, name
    record = yaml.safe_load((place / "killed" / "run.yaml").read_text())
    assert (record["batch_size"], record["grad_accumulation_steps"]) == (2, 2)
    assert (record["restarts"], record["resume"]) == (2, False)


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_signals_pass_through_the_parent(place: Path, number: signal.Signals, status: int) -> None:
    """Ctrl-C goes to the whole group, SIGTERM to the parent alone; both end with a saved run."""
    child = start(place, number.name)
    while not (place / number.name / "checkpoints" / "LATEST").exists():
        assert child.poll() is None
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    told, errors = child.communicate()
    assert (child.returncode, errors) == (status, "")
    assert told.count("stopped after step") == 1 and "--resume" in told
    resume = ["--resume", "--adapter-file", str(place / number.name / "adapters.npz")]
    assert lora.main([*resume, "--restarts", "0"]) == 0
    assert all(
        mx.array_equal(array, adapter(place, "whole")[name]).item()
        for name, array in adapter(place, number.name).items()
    )


def test_a_training_that_cannot_start_is_not_tried_again(place: Path) -> None:
    wrong = [*arguments(place, "bad"), "--targets", "nonesuch"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "lora.py"), *wrong], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
