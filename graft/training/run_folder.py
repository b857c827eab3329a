"""The files of a training run: everything stands in the folder of its adapter.

adapters.npz         the adapter as last saved, with adapter_config.json
adapters.best.npz    the one with the lowest validation loss
metrics.jsonl        what happened
run.yaml             the options, to be run again with `--config`
checkpoints/         what `--resume` continues from
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from graft.adapters.files import check_exists
from graft.adapters.formats.graft import check_suffix
from graft.data.sources import check_data_name
from graft.errors import InputError
from graft.storage.atomic import check_writable, new_file
from graft.training import options as run_options
from graft.training.checkpoints import Checkpoint, CheckpointStore
from graft.training.memory_plan import machine_bytes, parse_size, size_text
from graft.training.options import DEFAULT_ADAPTER, NO_ADAPTER, Options

import yaml


class RunFiles:
    """Paths and checkpoints of a run.

    Args:
        options: name the adapter and how many checkpoints to keep.

    Attributes:
        adapter: the adapter file.
        best: the adapter with the lowest validation loss.
        metrics: metrics.jsonl.
        store: the checkpoints.
    """

    def __init__(self, options: Options) -> None:
        self.adapter = Path(options.adapter_file or DEFAULT_ADAPTER)
        self.best = self.adapter.with_name(f"{self.adapter.stem}.best{self.adapter.suffix}")
        self.metrics = self.adapter.with_name("metrics.jsonl")
        self.options = self.adapter.with_name("run.yaml")
        self.store = CheckpointStore(
            self.adapter.with_name("checkpoints"), keep=options.keep_checkpoints
        )

    @property
    def resume_command(self) -> str:
        """What a person types to go on with this run."""
        return f"{program()} --resume --adapter-file {shlex.quote(str(self.adapter))}"

    def check_room(self, *, force: bool) -> None:
        """Refuse to start a run in the place of one that could be continued.

        Raises:
            InputError: an earlier run is unfinished and `force` does not hold.
        """
        earlier = self.store.newest()
        if earlier is not None and not earlier.state["finished"] and not force:
            raise InputError(
                f"{self.adapter.parent} holds a run that stopped at step {earlier.step}; continue "
                f"it with `{self.resume_command}`, or start anew with --force"
            )

    def clear(self) -> None:
        """Remove what an earlier run left; its adapter stays until the first save."""
        self.store.clear()
        self.best.unlink(missing_ok=True)

    def save_options(self, options: Options) -> None:
        """Write run.yaml."""
        with new_file(self.options) as temporary:
            text = yaml.safe_dump(run_options.record(options), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")

    def load_checkpoint(self) -> Checkpoint:
        """The newest whole checkpoint; damaged ones are told on standard error.

        Raises:
            InputError: there is none.
        """
        checkpoint, complaints = self.store.load()
        for complaint in complaints:
            print(f"note: {complaint}; using step {checkpoint.step}", file=sys.stderr)
        return checkpoint


def check_options(options: Options) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        InputError: the options contradict each other.
    """
    if not (options.train or options.test or options.prompt is not None):
        raise InputError(
            "nothing to do: give --train, --test or --prompt (--help lists all options)"
        )
    if options.dropout >= 1:
        raise InputError(f"--dropout {options.dropout}: give a probability below 1")
    if 0 in (options.val_batches, options.test_batches):
        raise InputError("--val-batches and --test-batches: give 1 or more, or -1 for all")
    if options.epochs is not None and (options.iters is not None or not options.epochs):
        raise InputError(f"--epochs {options.epochs}: give more than 0, and not --iters with it")
    if options.seed >= 2**32:
        raise InputError(f"--seed {options.seed}: give at most {2**32 - 1}")
    check_budget(options)
    if options.train or options.test:
        check_data_name(options.data)
    check_adapter_files(options)


def check_budget(options: Options) -> None:
    """Refuse a memory budget that is none.

    Raises:
        InputError: no size, more than the machine has, or nothing to be trained.
    """
    text = options.memory_budget
    if text is None:
        return
    if not options.train:
        raise InputError(f"--memory-budget {text} is for --train: give that, or leave it out")
    if parse_size(text) > machine_bytes():
        most = size_text(machine_bytes())
        raise InputError(f"--memory-budget {text}: this machine has {most}; give at most that")


def check_adapter_files(options: Options) -> None:
    """Refuse adapters that are not there and places where none can be written.

    Raises:
        InputError: the options contradict each other or the disk.
    """
    path = Path(options.adapter_file or DEFAULT_ADAPTER)
    if options.train:
        if options.adapter_file == NO_ADAPTER:
            raise InputError("--train needs a place for the adapter: --adapter-file none has none")
        check_suffix(path)
        check_writable(path)
    elif options.adapter_file not in (None, NO_ADAPTER):
        check_exists(path)
    if options.resume_adapter_file is not None:
        if not options.train:
            raise InputError("--resume-adapter-file is for --train; use it as --adapter-file")
        check_exists(Path(options.resume_adapter_file))


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run on another model or other data.

    Raises:
        InputError: what differs is named.
    """
    different = ["the model"] if saved["model"] != now["model"] else []
    different += [f"{n} data" for n, digest in now["data"].items() if saved["data"][n] != digest]
    if different:
        raise InputError(
            f"the checkpoint was made with other contents of {' and '.join(different)}; "
            "give back what it was made with, or start another run elsewhere"
        )


def program() -> str:
    """How `lora.py` was called: as a file or through the console command."""
    return "python lora.py" if Path(sys.argv[0]).name == "lora.py" else "graft lora"
