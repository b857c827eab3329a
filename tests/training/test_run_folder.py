"""The files of a run, what stands in their way, and a disk that is full."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora
from graft.storage import folder_lock
from graft.training.options import Options
from graft.training.run import Run
from graft.training.run_folder import RunFolder, program

import pytest
import yaml

from support.paths import ROOT
from support.tiny import LLAMA, TEXTS, write_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model", {**LLAMA, "num_hidden_layers": 1})
    write_rows(folder / "data", train=TEXTS * 4, valid=TEXTS)
    return folder


def arguments(place: Path, folder: Path, *more: str) -> list[str]:
    where = ["--model", str(place / "model"), "--data", str(place / "data")]
    adapter = ["--adapter-file", str(folder / "adapters.npz")]
    return ["--train", *where, *adapter, "--iters", "6", "--save-every", "2", *more]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_everything_stands_in_the_folder_of_the_adapter(tmp_path: Path) -> None:
    files = RunFolder(Options(adapter_file=str(tmp_path / "x.safetensors")))
    assert files.best == tmp_path / "x.best.safetensors"
    assert files.metrics == tmp_path / "metrics.jsonl"
    assert files.options == tmp_path / "run.yaml"


def test_the_command_that_resumes_is_quoted_and_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = RunFolder(Options(adapter_file="my run/a.npz"))
    monkeypatch.setattr(sys, "argv", ["/somewhere/lora.py"])
    assert files.resume_command == "python lora.py --resume --adapter-file 'my run/a.npz'"
    monkeypatch.setattr(sys, "argv", ["graft lora"])
    assert program() == "graft lora"


def test_the_saved_options_are_the_resolved_ones(place: Path, tmp_path: Path) -> None:
    assert lora.main(arguments(place, tmp_path, "--rank", "4")) == 0
    record = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (record["rank"], record["iters"]) == (4, 6)
    assert len(record) == len(Options.__dataclass_fields__)


def test_a_mistake_leaves_what_an_earlier_run_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints and the best adapter too: they go only when the new run begins."""
    assert lora.main(arguments(place, tmp_path)) == 0
    before = contents(tmp_path)
    wrongs = (["--targets", "nonesuch"], ["--rank", "400"], ["--report-to", "wandb"])
    for wrong in (*wrongs, ["--weight-decay", "0.1"]):
        assert lora.main(arguments(place, tmp_path, *wrong)) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_new_run_removes_the_checkpoints_of_a_finished_one(place: Path, tmp_path: Path) -> None:
    assert lora.main(arguments(place, tmp_path)) == 0
    (tmp_path / "checkpoints" / ".tmp-1-0000004").mkdir()
    assert lora.main(arguments(place, tmp_path, "--iters", "3")) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["0000002", "0000003", "LATEST"]


@pytest.mark.parametrize("resume", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_second_process_in_the_folder_is_refused_and_changes_nothing(
    place: Path,
    tmp_path: Path,
    resume: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.2)
    seen: list[tuple[int, str]] = []
    take = lora.take_step

    def meeting(run: Run, batches: Any) -> Any:
        if run.progress.step == 3:
            monkeypatch.setattr(lora, "take_step", take)
            before, _ = contents(tmp_path), capsys.readouterr()
            second = ["--resume", *given[5:7]] if resume else given
            seen.append((lora.main(second), capsys.readouterr().err))
            assert contents(tmp_path) == before
        return take(run, batches)

    given = arguments(place, tmp_path)
    monkeypatch.setattr(lora, "take_step", meeting)
    assert lora.main(given) == 0
    expected = f"error: another process is training in {tmp_path}: wait for its end, or name "
    assert seen == [(2, f"{expected}another --adapter-file\n")]
    assert lora.main(["--resume", *given[5:7]]) == 0


def test_what_a_killed_run_left_half_written_goes(place: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("adapters.npz", "adapter_config.json", "activations-0123.npy"):
        (tmp_path / f".tmp-{ended.pid}-{name}").write_text("half")
    assert lora.main(arguments(place, tmp_path)) == 0
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FULL = {
    "the adapter": ("save_adapter", "adapters.npz", "adapters.npz"),
    "the adapter as safetensors": ("save_adapter", "adapters.safetensors", "adapters.safetensors"),
    "a checkpoint": ("save_checkpoint", "adapters.npz", "checkpoints/0000004"),
    "metrics": ("report", "adapters.npz", "metrics.jsonl"),
}
# Fills the disk right before the chosen file is written at the fourth step.
FILLING = """
import os, sys
import graft, lora
from graft.training.run import Run

name, disk = sys.argv[1:3]
holder = Run if hasattr(Run, name) else lora
write = getattr(holder, name)

def filling(*arguments):
    run = arguments[0] if name != "save_adapter" else None
    step = run.progress.step if run else now.progress.step
    if step == 4:
        with open(os.path.join(disk, "filler"), "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 512):
                    pass
            except OSError:
                pass
        if name == "report":
            run.log.event(step, "too long for what is left of the last block" * 200)
    return write(*arguments)

take = lora.take_step

def taking(run, batches):
    global now
    now = run
    return take(run, batches)

lora.take_step = taking
setattr(holder, name, filling)
sys.exit(lora.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=() if w == "a checkpoint" else pytest.mark.slow) for w in FULL],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays_good(
    place: Path, small_disk: Path, what: str
) -> None:
    name, adapter, file = FULL[what]
    given = arguments(place, small_disk, "--steps-per-report", "1", "--rank", "4")
    given[given.index("--adapter-file") + 1] = str(small_disk / adapter)
    done = subprocess.run(
        [sys.executable, "-c", FILLING, name, str(small_disk), *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    expected = f"error: no space left on disk while writing {small_disk / file}\n"
    assert (done.stderr, done.returncode) == (expected, 1)
    assert not [path for path in small_disk.rglob("*") if path.name.startswith(".tmp")]
    (small_disk / "filler").unlink()
    resume = ["--resume", "--adapter-file", str(small_disk / adapter)]
    assert lora.main([*resume, "--keep-checkpoints", "1"]) == 0
    whole = small_disk.parent / "whole"
    assert lora.main([*given[:-4], "--rank", "4", "--adapter-file", str(whole / adapter)]) == 0
    assert (whole / adapter).read_bytes() == (small_disk / adapter).read_bytes()
    for line in (small_disk / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 6
