"""The files of a training run, all in the folder of its adapter.

adapters.npz         the adapter as last saved, with adapter_config.json
adapters.best.npz    the adapter with the lowest validation loss
metrics.jsonl        losses and events, one JSON object per line
run.yaml             the options, to be used again with `--config`
checkpoints/         what `--resume` continues from
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.console import note
from graft.errors import InputError
from graft.storage.atomic import errors_name, new_file, remove_leftovers
from graft.storage.folder_lock import FolderLock
from graft.training.checkpoints import Checkpoint, CheckpointStore
from graft.training.options import DEFAULT_ADAPTER, Options, record

import yaml


class RunFolder:
    """Paths and checkpoints of a run.

    Args:
        options: name the adapter and the number of checkpoints to keep.

    Attributes:
        path: the folder.
        adapter: the adapter file.
        best: the adapter with the lowest validation loss.
        metrics: metrics.jsonl.
        options: run.yaml.
        store: the checkpoints.
        lock: held by the process that trains here.
    """

    def __init__(self, options: Options) -> None:
        self.adapter = Path(options.adapter_file or DEFAULT_ADAPTER)
        self.path = self.adapter.parent
        self.best = self.adapter.with_name(f"{self.adapter.stem}.best{self.adapter.suffix}")
        self.metrics = self.path / "metrics.jsonl"
        self.options = self.path / "run.yaml"
        busy = f"another process is training in {self.path}: wait for its end, or name another "
        self.lock = FolderLock(self.path, busy=f"{busy}--adapter-file")
        self.store = CheckpointStore(self.path / "checkpoints", keep=options.keep_checkpoints)

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        return f"{program()} --resume --adapter-file {shlex.quote(str(self.adapter))}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if there is none, and keep other processes from training in it.

        Raises:
            InputError: another process trains in it.
        """
        with errors_name(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        remove_leftovers(self.path)
        try:
            yield
        finally:
            self.lock.release()

    def check_no_unfinished_run(self, *, force: bool) -> None:
        """Refuse to start a run where an earlier one could be continued.

        Raises:
            InputError: an earlier run is unfinished and `force` is false.
        """
        earlier = self.store.newest()
        if earlier is not None and not earlier.state["finished"] and not force:
            raise InputError(
                f"{self.path} holds a run that stopped at step {earlier.step}; continue it with "
                f"`{self.resume_command}`, or start a new one with --force"
            )

    def clear(self) -> None:
        """Remove what an earlier run left; its adapter stays until the first save."""
        self.store.clear()
        self.best.unlink(missing_ok=True)

    def save_options(self, options: Options) -> None:
        """Write run.yaml."""
        with new_file(self.options) as temporary:
            text = yaml.safe_dump(record(options), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")

    def load_checkpoint(self) -> Checkpoint:
        """The newest complete checkpoint; damaged ones are reported.

        Raises:
            InputError: there is none.
        """
        checkpoint, complaints = self.store.load()
        for complaint in complaints:
            note(f"{complaint}; using step {checkpoint.step}")
        return checkpoint


def check_same_run(
    saved: dict[str, Any], now: dict[str, Any], *, former_model: str | None = None
) -> None:
    """Refuse to continue a run on another model or other data.

    Args:
        saved: the fingerprints in the checkpoint.
        now: those of the model and data at hand.
        former_model: the model's as earlier versions computed it.

    Raises:
        InputError: they differ; the message names what differs.
    """
    different = ["the model"] if saved["model"] not in (now["model"], former_model) else []
    different += [f"{n} data" for n, digest in now["data"].items() if saved["data"][n] != digest]
    if different:
        raise InputError(
            f"the checkpoint was made with other contents of {' and '.join(different)}; "
            "restore what it was made with, or start another run elsewhere"
        )


def program() -> str:
    """How `lora.py` was called: as a file or through the console command."""
    return "python lora.py" if Path(sys.argv[0]).name == "lora.py" else "graft lora"
