"""Terminal output: notes, tables and progress bars, sizes and suggestions as text.

The only module besides the commands that writes to the terminal.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graft.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def say(text: str) -> None:
    """Print a line about the work in progress."""
    print(text)


def note(text: str) -> None:
    """Print a line on standard error about something that the user may not expect."""
    print(f"note: {text}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name closest to a misspelled one, as `did you mean 'NAME'?`; empty if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `12GB`, `900 MB` or `1.5GiB`.

    Raises:
        InputError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)", text.strip())
    unit = UNITS.get(match[2].upper(), 0) if match else 0
    size = float(match[1]) * unit if match else 0.0
    if not 1 <= size < 2**63:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise InputError(f"{shown!r} is not a size: give one such as 12GB, 900MB or 1.5GiB")
    return int(size)


def bytes_text(size: float) -> str:
    """Bytes with a decimal unit and three digits, such as `109 MB`; `parse_bytes` reads it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5 or unit == "GB":
            break
        size /= 1000
    digits = 0 if unit == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> str:
    """Text columns, each as wide as its widest cell.

    Args:
        head: the names of the columns.
        rows: the cells, as many in each row as there are columns.
        right: names of the columns to align on the right.
    """
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


@contextmanager
def progress_bar(
    text: str,
    total: float | None,
    *,
    console: "Console | None" = None,
    enabled: bool | None = None,
    columns: Sequence[Any] = (),
    **fields: Any,
) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, erased at the end.

    Args:
        text: what is in progress.
        total: the value at which it is done; `None` until that is known.
        console: where to draw it, by default standard error.
        enabled: whether to draw it; by default if the console is a terminal.
        columns: rich's columns after the bar; by default the count.
        fields: values that `columns` show, by name.

    Yields:
        A function that updates the bar; it takes `completed`, `advance`, `total` and the fields.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = console or Console(stderr=True)
    shown = console.is_terminal if enabled is None else enabled
    columns = columns or [MofNCompleteColumn()]
    with Progress(
        *[TextColumn("{task.description}"), BarColumn(), *columns],
        console=console,
        transient=True,
        disable=not shown,
    ) as progress:
        yield functools.partial(progress.update, progress.add_task(text, total=total, **fields))
