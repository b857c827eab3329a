"""Metrics in other places: TensorBoard's event files are read back, wandb is stood in for."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lora
from graft.errors import InputError
from graft.training.options import REPORTERS as REPORTER_NAMES
from graft.training.reporters import REPORTERS, numbers
from graft.training.run import Run

import pytest

from support.tiny import LLAMA, TEXTS, write_model, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model", {**LLAMA, "num_hidden_layers": 1})
    write_rows(tmp_path / "data", train=TEXTS * 4, valid=TEXTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str) -> int:
    where = ["--model", "model", "--data", "data", "--adapter-file", "run/adapters.npz"]
    often = ["--iters", "4", "--steps-per-report", "2", "--save-every", "2"]
    return lora.main(["--train", *where, *often, *arguments])


def expected() -> list[tuple[str, int, float]]:
    """(name, step, value) of all numbers in metrics.jsonl."""
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [(name, line["step"], value) for line in lines for name, value in numbers(line).items()]


def test_every_name_of_the_options_is_there() -> None:
    assert sorted(REPORTERS) == sorted(REPORTER_NAMES)


def test_the_numbers_of_a_line_stand_under_what_they_are_of() -> None:
    line = {"kind": "train", "step": 3, "loss": 1.5, "tokens": 7, "grad_norm": None}
    assert numbers(line) == {"train/loss": 1.5, "train/tokens": 7}
    line = {"kind": "eval", "split": "valid", "step": 3, "loss": 1.5}
    assert numbers(line) == {"valid/loss": 1.5}
    assert numbers({"kind": "event", "step": 3, "event": "saved", "seconds": 1.0}) == {}
    assert numbers({"kind": "eval", "split": "test", "step": None, "loss": 1.5}) == {}


def events(file: Path) -> Iterator[Any]:
    """The events of a file: TFRecords of length, checksum, message, checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        event = proto.Event()
        event.ParseFromString(content[12 : 12 + length])
        yield event
        content = content[16 + length :]


def test_tensorboard_s_event_file_holds_what_metrics_jsonl_does(here: Path) -> None:
    pytest.importorskip("tensorboardX")
    assert train("--report-to", "tensorboard") == 0
    (file,) = Path("run/tensorboard").iterdir()
    found = [(v.tag, e.step, v.simple_value) for e in events(file) for v in e.summary.value]
    wanted = expected()
    assert [each[:2] for each in found] == [each[:2] for each in wanted]
    assert [each[2] for each in found] == pytest.approx([each[2] for each in wanted], rel=1e-6)
    assert {"train/loss", "train/learning_rate", "valid/loss"} <= {each[0] for each in found}


class Wandb(ModuleType):
    """Takes what wandb would."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[str, int, float]] = []
        self.finished = 0
        self.ids: list[str] = []

    def init(self, *, dir: str, config: dict[str, Any], id: str, resume: str) -> "Wandb":
        assert resume == "allow"
        self.config = config
        self.ids.append(id)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged += [(name, step, value) for name, value in values.items()]

    def finish(self) -> None:
        self.finished += 1


def test_wandb_is_given_the_options_and_every_number(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train("--report-to", "wandb", "--rank", "4") == 0
    assert (wandb.config["rank"], wandb.config["iters"], wandb.finished) == (4, 4, 1)
    assert wandb.logged == expected() != []


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    needed = f"--report-to {name} needs {module}: pip install 'graft-mlx\\[{name}\\]'"
    with pytest.raises(InputError, match=needed):
        REPORTERS[name](tmp_path / "run", {}, None)
    assert not (tmp_path / "run").exists()


class EventWriter:
    """Takes what tensorboardX would: a file for each writer."""

    def __init__(self, *, logdir: str) -> None:
        Path(logdir).mkdir(parents=True, exist_ok=True)
        number = len(list(Path(logdir).iterdir()))
        self._path = Path(logdir, f"events.out.tfevents.{number}")
        self._lines: list[str] = []

    def add_scalar(self, name: str, value: float, step: int, *, walltime: float) -> None:
        self._lines.append(json.dumps([name, step, value]))
        self._path.write_text("\n".join(self._lines))

    def close(self) -> None:
        assert self._lines


def killed_at(step: int, *arguments: str) -> None:
    """Two steps after a checkpoint, of which both services have heard."""
    take = lora.take_step

    def taking(run: Run, batches: Any) -> Any:
        if run.progress.step == step:
            raise Killed
        return take(run, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lora, "take_step", taking)
        train("--steps-per-report", "1", *arguments)


class Killed(BaseException):
    """Stands for the end of a process."""


def test_tensorboard_holds_no_step_twice_after_resuming(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = ModuleType("tensorboardX")
    monkeypatch.setattr(stand_in, "SummaryWriter", EventWriter, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", stand_in)
    killed_at(3, "--report-to", "tensorboard")
    assert lora.main(["--resume", "--adapter-file", "run/adapters.npz"]) == 0
    (file,) = Path("run/tensorboard").iterdir()
    found = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
    assert found == expected()
    assert [step for name, step, _ in found if name == "train/loss"] == [1, 2, 3, 4]


def test_wandb_continues_the_run_that_is_resumed_and_no_other(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    killed_at(3, "--report-to", "wandb")
    assert lora.main(["--resume", "--adapter-file", "run/adapters.npz"]) == 0
    assert train("--report-to", "wandb") == 0
    first, second, third = wandb.ids
    assert first == second != third


def test_reporting_elsewhere_changes_nothing_in_the_run_and_may_begin_on_resuming(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    adapter = Path("run/adapters.npz").read_bytes()
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    resume = ["--resume", "--adapter-file", "run/adapters.npz", "--iters", "6"]
    assert lora.main([*resume, "--report-to", "wandb"]) == 0
    assert "changed: --report-to wandb (the run has None)" in capsys.readouterr().out
    assert {step for _, step, _ in wandb.logged} == {6}
    assert train("--iters", "4", "--report-to", "wandb") == 0
    assert Path("run/adapters.npz").read_bytes() == adapter
