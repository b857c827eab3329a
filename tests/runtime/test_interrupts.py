"""Signals as a wish to end."""

import os
import signal
import subprocess
import sys

from graft.runtime.interrupts import Interrupts

import pytest

from support.paths import ROOT


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_ends_nothing(number: signal.Signals, status: int) -> None:
    with Interrupts() as interrupts:
        assert (interrupts.received, interrupts.exit_status) == (None, 0)
        os.kill(os.getpid(), number)
        assert interrupts.received == number
    assert interrupts.exit_status == status


def test_afterwards_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before
    with pytest.raises(ZeroDivisionError), Interrupts():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_whichever_came_first(
    first: signal.Signals, second: signal.Signals
) -> None:
    code = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        "spec = spec_from_file_location('interrupts', "
        "sys.argv[3] + '/graft/runtime/interrupts.py')\n"
        "module = module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "with module.Interrupts():\n"
        "    os.kill(os.getpid(), int(sys.argv[1]))\n"
        "    print('once', flush=True)\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
        "    print('twice', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(int(first)), str(int(second)), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-second, "once\n", "")
