"""A folder's lock: one process at a time, and it ends with the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from graft.errors import InputError
from graft.storage import folder_lock
from graft.storage.folder_lock import FolderLock

import pytest

from support.paths import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from graft.storage.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]), busy="taken")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.2)


def test_a_lock_keeps_others_out_until_its_process_is_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    mine = FolderLock(tmp_path, busy="it is taken")
    with pytest.raises(InputError, match="it is taken"):
        mine.acquire()
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    mine.acquire()
    assert os.listdir(tmp_path) == []


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    first, second = (FolderLock(tmp_path, busy="taken") for _ in range(2))
    first.acquire()
    first.acquire()
    with pytest.raises(InputError, match="taken"):
        second.acquire()
    first.release()
    second.acquire()
    del second
    first.acquire()


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    FolderLock(tmp_path / "none", busy="taken").acquire()
    assert os.listdir(tmp_path) == []
