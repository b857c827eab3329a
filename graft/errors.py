"""What a command says when its input is at fault, and how it exits.

Knows nothing of models or training. Every command's ``main`` is wrapped by `command` and parses
with `Parser`, so that what a person can mend is one line on standard error and exit status 2, never
a traceback.
"""

import argparse
import errno
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

Main = Callable[[Sequence[str] | None], int]


class InputError(Exception):
    """Something the user can mend: names what is wrong, where, and the next step, in one line."""


class RunError(Exception):
    """A run that cannot go on, through no fault of its input: says what was seen, in one line.

    Attributes:
        status: what the command exits with.
    """

    def __init__(self, text: str, *, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is an `InputError`, without the list of all options before it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(f"{message}; --help lists all options")


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def command(main: Main) -> Callable[..., int]:
    """Wrap a command's ``main(argv=None)`` so that expected failures end in one line.

    Returns:
        ``main`` with exit status 2 after an `InputError`, that of a `RunError` after one, 1 after a
        full disk, 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe went away (`... | head`): nothing is wrong with the input.
            sys.stderr.close()
            return 1
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print(f"error: no space left on disk while writing {error.filename}", file=sys.stderr)
            return 1

    return run
