"""What every command shares: its parser, and how errors become one line and an exit status.

Each command's ``main`` is wrapped by `command` and parses with `Parser`, so that what a user can
fix is one line on standard error and exit status 2, never a traceback.
"""

import argparse
import contextlib
import errno
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from graft.console import did_you_mean, one_line
from graft.errors import InputError, RunError

MOST_DIGITS, LONGEST_MESSAGE = 40, 500
# Options whose value is a text that may be empty.
MAY_BE_EMPTY = ("prompt", "system")
Main = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default.

    Its errors are `InputError`s, without the list of all options before them. Numbers are finite,
    whole ones have at most 64 bits, and arguments are UTF-8. Options are written out, since an
    abbreviation can mean another one, and have a value, since an empty one is most often that of
    a shell variable that is not set.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        usual = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **{**usual, **settings})
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does.

        Raises:
            InputError: an argument is not UTF-8, or the command line is wrong.
        """
        given = list(sys.argv[1:] if args is None else args)
        if unreadable := [text for text in given if not _is_utf8(text)]:
            raise InputError(f"the argument {unreadable[0]!a} is not UTF-8")
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            hints = [f"({hint})" for hint in map(self._hint, unknown) if hint]
            self.error(f"unrecognized arguments: {' '.join([*unknown, *hints])}")
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.dest not in MAY_BE_EMPTY and (value == "" or value == [""]):
                name = "/".join(action.option_strings) or action.metavar or action.dest
                self.error(f"argument {name}: its value is empty")
        return found, unknown

    def _hint(self, argument: str) -> str:
        name = argument.partition("=")[0]
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        return did_you_mean(name, known) if name.startswith("--") else ""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            InputError: always.
        """
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        raise InputError(f"{one_line(ValueError(message))}; --help lists all options")


def _whole_number(text: str) -> int:
    number = int(text[: MOST_DIGITS + 1])
    if len(text) > MOST_DIGITS or not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:MOST_DIGITS]} is too large a number")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:MOST_DIGITS]}: give a finite number")
    return number


def _is_utf8(text: str) -> bool:
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


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
        ``main`` with exit status 2 after an `InputError` or a file that cannot be used, that of a
        `RunError` after one, 1 after a full disk or memory, 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _prepare_streams()
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except InputError as error:
            return _fail(str(error), 2)
        except RunError as error:
            return _fail(str(error), error.status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe went away (`... | head`): nothing is wrong with the input.
            _discard_output()
            return 1
        except MemoryError:
            return _fail("out of memory", 1)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                if error.filename is None:
                    _discard_output()
                name = error.filename or "the output"
                return _fail(f"no space left on disk while writing {name}", 1)
            if error.filename is None:
                raise
            return _fail(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", 2)

    return run


def _fail(text: str, status: int) -> int:
    print("error:", " ".join(text.splitlines()), file=sys.stderr)
    return status


def _prepare_streams() -> None:
    """Open standard streams that are closed, and let none fail because of a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the end)
        stream, errors = getattr(sys, name), "replace" if mode == "r" else "backslashreplace"
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)


def _discard_output() -> None:
    """Keep the interpreter from writing the rest of the output again when it exits."""
    with contextlib.suppress(OSError):  # a stand-in has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
