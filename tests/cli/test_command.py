"""graft/errors.py: how a command ends."""

import argparse
import errno
import importlib
import subprocess
import sys
from collections.abc import Sequence

from graft import __main__
from graft.cli.command import Parser, command
from graft.errors import InputError

import pytest

from support.paths import ROOT


def raising(error: BaseException) -> int:
    """The exit status of a command in which `error` is raised."""

    @command
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main([])


def test_success_passes_the_arguments_in_and_the_status_out() -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        return len(argv or ())

    assert main(["a", "b", "c"]) == 3
    assert main() == 0


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("--rank 0: at least 1"), 2, "error: --rank 0: at least 1\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/weights.npz"),
            1,
            "error: no space left on disk while writing out/weights.npz\n",
        ),
    ],
)
def test_what_can_be_expected_ends_in_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", said)


def test_a_mistyped_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        parser = Parser()
        parser.add_argument("--rank", type=int)
        parser.parse_args(argv)
        return 0

    assert main(["--rank", "8"]) == 0
    assert main(["--rank", "eight"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "--rank: invalid int value: 'eight'" in printed.err


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "I/O error"), OSError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


def test_a_closed_pipe_ends_silently() -> None:
    code = (
        "import sys\n"
        "from graft.cli.command import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    while True: print('line', flush=True)\n"
        "sys.exit(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == b"line\n"
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(timeout=30) == 1


def read(*arguments: str) -> argparse.Namespace:
    parser = Parser()
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--data")
    parser.add_argument("--prompt")
    parser.add_argument("files", nargs="*")
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epoch", "2"], "unrecognized arguments: --epoch (did you mean '--epochs'?)"),
        (["--epoch=2"], "unrecognized arguments: --epoch=2 (did you mean '--epochs'?)"),
        (["--dat", "x"], "unrecognized arguments: --dat (did you mean '--data'?)"),
        (["--nonesuch"], "unrecognized arguments: --nonesuch;"),
        (["--data="], "argument --data: its value is empty"),
        (["--data", ""], "argument --data: its value is empty"),
        ([""], "argument files: its value is empty"),
    ],
)
def test_abbreviated_and_empty_options_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert said in str(caught.value)


def test_a_prompt_may_be_empty() -> None:
    assert read("--prompt", "").prompt == ""


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_option_of_every_verb_shows_its_default(verb: str) -> None:
    """Those that are 0 too."""
    module = importlib.import_module(__main__.VERBS[verb][0].partition(":")[0])
    parser = module.build_parser()
    formatter = parser.formatter_class("prog")
    shown = [action for action in parser._actions if action.help not in (None, argparse.SUPPRESS)]
    for action in shown:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "(default: " in formatter._get_help_string(action), action.option_strings
            if action.default == 0:
                assert "(default: %(default)s" in formatter._get_help_string(action)
