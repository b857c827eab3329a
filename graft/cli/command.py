"""What every command shares: its parser, and how errors become one line and an exit status.

Each command's ``main`` is wrapped by `command` and parses with `Parser`, so that what a person can
mend is one line on standard error and exit status 2, never a traceback.
"""

import argparse
import errno
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from graft.errors import InputError, RunError

Main = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is an `InputError`, without the list of all options before it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(f"{message}; --help lists all options")


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
