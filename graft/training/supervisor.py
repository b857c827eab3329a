"""Runs training in a child process, and restarts it from the last checkpoint if it is killed.

Metal's watchdog or a lack of memory can kill a process in ways that no handler sees. The restarted
training has fewer rows per batch and more accumulation instead, which takes less memory and
computes the same steps: up to rounding, since gradients are added in other parts, and with other
draws of dropout.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from graft.console import note
from graft.training.options import Options
from graft.training.run_folder import RunFolder

# Set for the child; an option would end up in the record of the run.
SUPERVISED = "GRAFT_SUPERVISED"
# The child of a supervisor: `lora.py` by its verb.
COMMAND: Sequence[str] = ("-m", "graft", "lora")

# Said when a restarted run will not end with the bits of an undisturbed one.
DIFFERENCE = (
    "; it computes the same steps up to rounding, but with --dropout it drops other inputs "
    "than a run without a restart"
)


def is_supervised() -> bool:
    """Whether this process is the child of `supervise_run`."""
    return SUPERVISED in os.environ


def supervise_run(options: Options, arguments: Sequence[str]) -> int:
    """Train in a child process, started again up to `--restarts` times if it is killed.

    Args:
        options: the parsed options.
        arguments: the command line that they came from, for the child.
    """
    store = RunFolder(options).store
    earlier = store.stamps()

    def resume() -> list[str]:
        """The flag to resume, once this run has written a checkpoint of its own."""
        return ["--resume"] if store.stamps() - earlier else []

    return supervise(
        [sys.executable, *COMMAND, *arguments],
        resume,
        restarts=options.restarts,
        batch_size=options.batch_size,
        accumulation=options.grad_accumulation_steps,
    )


def supervise(
    command: Sequence[str],
    resume: Callable[[], Sequence[str]],
    *,
    restarts: int,
    batch_size: int,
    accumulation: int,
) -> int:
    """Run a training command, and again with smaller batches whenever a signal kills it.

    Args:
        command: program and arguments of the training process.
        resume: returns what to add to them to continue the run.
        restarts: how often to restart it.
        batch_size: rows per batch in `command`.
        accumulation: batches per step in `command`.

    Returns:
        The exit status of the last process, as a shell reports it.
    """
    arguments = list(command)
    for left in range(restarts, -1, -1):
        # A process whose worker was killed exits with 128 plus the signal's number.
        status = _run(arguments)
        status = 128 - status if status > 128 else status
        if not _died(status) or left == 0:
            break
        before = batch_size
        batch_size, accumulation = smaller_batches(batch_size, accumulation)
        note(
            f"the training process was killed by {signal.Signals(-status).name}; restart "
            f"{restarts - left + 1} of {restarts} with {batch_size} rows per batch and "
            f"{accumulation} batches per step" + (DIFFERENCE if batch_size != before else "")
        )
        sizes = [f"--batch-size={batch_size}", f"--grad-accumulation-steps={accumulation}"]
        arguments = [*command, *resume(), *sizes]
    return status if status >= 0 else 128 - status


def smaller_batches(batch_size: int, accumulation: int) -> tuple[int, int]:
    """At most half the rows per batch, and the accumulation that makes the same step."""
    rows = batch_size * accumulation
    fewer = next(n for n in range(max(batch_size // 2, 1), 0, -1) if rows % n == 0)
    return fewer, rows // fewer


def _died(status: int) -> bool:
    """Whether a process was killed by a signal other than a request to stop."""
    return status < 0 and -status not in (signal.SIGINT, signal.SIGTERM)


def _run(arguments: Sequence[str]) -> int:
    """Run a child to its end; a terminal sends it Ctrl-C as well, SIGTERM is passed on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        arguments, env={**os.environ, SUPERVISED: "1"}, preexec_fn=_restore_interrupts
    )
    previous = signal.signal(signal.SIGTERM, _pass_on(child))
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, previous)


def _restore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _pass_on(child: "subprocess.Popen[bytes]") -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    return handler
