"""Ctrl-C and SIGTERM as a wish that a loop can ask after, so that it ends at a good place."""

import signal
from types import FrameType, TracebackType


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is noted; the second ends the process at once.

    Attributes:
        received: the signal that came, if one did.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that a signal ended: 130 for Ctrl-C, 143 for TERM."""
        return 128 + self.received if self.received is not None else 0

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # The system's own handling needs no Python to run, which a long computation would hold up.
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
