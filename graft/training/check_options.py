"""Refuses options that conflict with each other or with files, before anything is loaded."""

from pathlib import Path

from graft.adapters.files import check_exists
from graft.adapters.formats.graft import check_suffix
from graft.console import bytes_text
from graft.data.sources import check_data_name
from graft.errors import InputError
from graft.runtime.memory import machine_bytes
from graft.storage.atomic import check_writable
from graft.training.memory_plan import parse_budget
from graft.training.optimizers import parse_betas
from graft.training.options import DEFAULT_ADAPTER, NO_ADAPTER, Options


def check_options(options: Options, *, resumes: bool = False) -> None:
    """Refuse what cannot work.

    Args:
        options: all of them.
        resumes: whether a checkpoint is continued, which holds what the run started from.

    Raises:
        InputError: the options contradict each other.
    """
    if not (options.train or options.test or options.prompt is not None):
        raise InputError(
            "nothing to do: give --train, --test or --prompt (--help lists all options)"
        )
    check_training_options(options)
    if options.train or options.test:
        check_data_name(options.data)
    _check_adapter_files(options, resumes=resumes)


def check_training_options(options: Options) -> None:
    """Refuse values that no training or evaluation can have.

    Raises:
        InputError: a value is out of range, or two options contradict each other.
    """
    if options.dropout >= 1:
        raise InputError(f"--dropout {options.dropout}: give a probability below 1")
    if 0 in (options.val_batches, options.test_batches):
        raise InputError("--val-batches and --test-batches: give 1 or more, or -1 for all")
    if options.epochs is not None and (options.iters is not None or not options.epochs):
        raise InputError(f"--epochs {options.epochs}: give more than 0, and not --iters with it")
    parse_betas(options.betas)
    _check_budget(options)


def _check_budget(options: Options) -> None:
    text = options.memory_budget
    if text is None:
        return
    if not options.train:
        raise InputError(f"--memory-budget {text} only applies to --train")
    if parse_budget(text) > machine_bytes():
        most = bytes_text(machine_bytes())
        raise InputError(f"--memory-budget {text}: this machine has {most}; give at most that")


def _check_adapter_files(options: Options, *, resumes: bool) -> None:
    path = Path(options.adapter_file or DEFAULT_ADAPTER)
    if options.train:
        if options.adapter_file == NO_ADAPTER:
            raise InputError(
                f"--train writes an adapter: --adapter-file {NO_ADAPTER} names no file for it"
            )
        check_suffix(path)
        check_writable(path)
    elif options.adapter_file not in (None, NO_ADAPTER):
        check_exists(path)
    if options.resume_adapter_file is not None:
        if not options.train:
            raise InputError("--resume-adapter-file is for --train; otherwise use --adapter-file")
        if not resumes:
            check_exists(Path(options.resume_adapter_file))
