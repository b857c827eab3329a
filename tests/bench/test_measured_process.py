"""A process is run to its end and measured; no test asserts a time."""

import sys

from graft.bench.measured_process import measure_process
from graft.errors import InputError

import pytest


def test_a_tool_that_fails_is_named() -> None:
    code = "import sys; sys.exit('no such thing')"
    with pytest.raises(InputError, match="tool failed: no such thing"):
        measure_process([sys.executable, "-c", code], name="tool")


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_of_children_counts_and_what_they_share_counts_once() -> None:
    code = """
import os, time
shared = bytearray(b"x") * 100_000_000
for _ in range(2):
    if not os.fork():
        own = bytearray(b"y") * 50_000_000
        time.sleep(2)
        os._exit(0)
time.sleep(2)
"""
    figures = measure_process([sys.executable, "-c", code], name="tool").figures
    assert 2e8 < figures["resident_bytes"] < 3.5e8  # 4e8 if each had its own of all
    assert figures["seconds"] > 2
