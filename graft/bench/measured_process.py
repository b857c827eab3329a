"""Runs a process to its end and measures its time and memory."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from graft.bench.work import Figures
from graft.errors import InputError

# The folder that holds `graft`: a checkout, or site-packages.
ROOT = Path(__file__).resolve().parents[2]
_SECONDS_BETWEEN_SAMPLES = 0.5


@dataclass(frozen=True)
class FinishedProcess:
    """A process that succeeded.

    Attributes:
        figures: `seconds`, and `resident_bytes` at the peak.
        output: standard output.
        started: when it started, in seconds since the epoch.
    """

    figures: Figures
    output: str
    started: float


def measure_process(arguments: Sequence[str], *, name: str) -> FinishedProcess:
    """Run a process to its end.

    Args:
        arguments: the command line.
        name: what to call the process in errors.

    Raises:
        InputError: the process failed; with the last line of its standard error.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    start, started = time.perf_counter(), time.time()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(arguments, stdout=output, stderr=errors, env=environment)
        with _MemorySampler(child.pid) as sampler:
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {child.returncode}"
            raise InputError(f"{name} failed: {reason}")
        # The fallback also counts the memory of this process, at the time of the fork.
        resident = sampler.peak_bytes or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        figures = {"seconds": seconds, "resident_bytes": float(resident)}
        return FinishedProcess(figures, output.read().decode(), started)


class _MemorySampler(threading.Thread):
    """Samples the memory of a process and its children while it is entered (Linux).

    Attributes:
        peak_bytes: the process's own resident peak plus the private memory of its children; 0 if
            the system does not report them.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid, self._ended = pid, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_SAMPLES):
            children = descendants(self._pid)
            private = sum(_bytes_of(pid, "smaps_rollup", "Private_Dirty:") for pid in children)
            self.peak_bytes = max(
                self.peak_bytes, _bytes_of(self._pid, "status", "VmHWM:") + private
            )

    def __enter__(self) -> "_MemorySampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def _bytes_of(pid: int, file: str, field: str) -> int:
    """A size that the system reports about a process; 0 if it does not."""
    with suppress(OSError):
        for line in Path("/proc", str(pid), file).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def descendants(pid: int) -> list[int]:
    """The children of a process, and their children, by process id (Linux)."""
    children: list[int] = []
    for path in Path("/proc", str(pid)).glob("task/*/children"):
        with suppress(OSError):
            children += map(int, path.read_text().split())
    return children + [deeper for child in children for deeper in descendants(child)]
