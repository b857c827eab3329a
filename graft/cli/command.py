"""What every command shares: its parser, and how errors become one line and an exit status.

Each command's ``main`` is wrapped by `command` and parses with `Parser`, so that what a user can
fix is one line on standard error and exit status 2, never a traceback.
"""

import argparse
import errno
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from graft.errors import InputError, RunError

Main = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default.

    Its errors are `InputError`s, without the list of all options before them.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; --help lists all options")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds `(default: VALUE)` to the help of every option that takes a value."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_switch = not action.option_strings or action.nargs == 0 or action.required
        if is_switch or action.default is argparse.SUPPRESS or "(default" in text:
            return text
        return f"{text} (default: {'none' if action.default in (None, [], ()) else '%(default)s'})"


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
