"""Ctrl-C and SIGTERM as a request that a loop can check, so that it ends safely between steps."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """A context that records the first SIGINT or SIGTERM; the second ends the process at once.

    Only the main thread of a process can handle signals; in others the context has no effect.

    Attributes:
        received: the signal, if there was one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @property
    def exit_status(self) -> int:
        """The status of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, else 0."""
        return 128 + self.received if self.received is not None else 0

    def __enter__(self) -> "Interrupts":
        in_main_thread = threading.current_thread() is threading.main_thread()
        signals = self.SIGNALS if in_main_thread else ()
        self._before = {number: signal.signal(number, self._note) for number in signals}
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
        # The default handling does not wait for Python, which a long computation would hold up.
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
