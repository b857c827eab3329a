"""graft/errors.py: how a command ends."""

import argparse
import errno
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


def test_a_file_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)) == 2
    assert capsys.readouterr().err == f"error: cannot use {'a' * 300}: File name too long\n"


def test_a_message_of_several_lines_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(InputError("there is no a\nb")) == 2
    assert capsys.readouterr().err == "error: there is no a b\n"


@pytest.mark.parametrize(
    "argument",
    ["9" * 5000, "1" * 41, "x" * 5000, "nan", "inf", "1e999", "\udcff", "\ud800", str(2**63), ""],
)
def test_numbers_are_finite_and_arguments_are_utf8(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        parser = Parser()
        parser.add_argument("--rank", type=int)
        parser.add_argument("--alpha", type=float)
        parser.parse_args(argv)
        return 0

    whole = argument not in ("nan", "inf", "1e999")
    assert main([f"--rank={argument}" if whole else f"--alpha={argument}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and len(message) < 700


PRINTS = (
    "import sys\n"
    "from graft.cli.command import command\n"
    "@command\n"
    "def main(argv=None):\n"
    "    sys.stdin.read()\n"
    "    print('Ä🙂', 'x' * 100_000, flush=True)\n"
    "    print('note: Ä', file=sys.stderr)\n"
    "    return 0\n"
    "sys.exit(main())\n"
)


@pytest.mark.parametrize(
    ("streams", "status", "errors"),
    [
        ("< /dev/null > /dev/null", 0, "note: \\xc4\n"),
        ("<&- > /dev/null", 0, "note: \\xc4\n"),
        ("< /dev/null >&-", 0, "note: \\xc4\n"),
        ("<&- >&- 2>&-", 0, ""),
        ("< /dev/null > /dev/full", 1, "error: no space left on disk while writing the output\n"),
        ("< in", 0, "note: \\xc4\n"),
    ],
)
def test_streams_may_be_ascii_closed_or_full(
    streams: str, status: int, errors: str, tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b"\xff\xfe")
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(PRINTS)} {streams}",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (status, errors)


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
