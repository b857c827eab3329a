"""graft/storage/atomic.py: files and folders that appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.atomic import check_free, check_writable, new_file, new_folder, reserve

import pytest

from support.paths import ROOT


def everything_in(folder: Path) -> dict[str, str]:
    """Relative path of each file to its text, temporary ones included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "new" / "weights.npz"
    with new_file(place) as temporary:
        temporary.write_text("half")
        assert not place.exists()
        assert temporary.suffix == ".npz"
        assert temporary.parent == place.parent
        temporary.write_text("whole")
    assert everything_in(tmp_path) == {"new/weights.npz": "whole"}


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("old")
    with new_file(place) as temporary:
        temporary.write_text("new")
        assert place.read_text() == "old"
    assert everything_in(tmp_path) == {"file": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    place = tmp_path / "file"
    place.write_text("old")
    with pytest.raises(error), new_file(place) as temporary:
        temporary.write_text("half")
        raise error
    assert everything_in(tmp_path) == {"file": "old"}


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("old")
    code = (
        "import os, signal, sys\n"
        "from graft.storage.atomic import new_file\n"
        "with new_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert place.read_text() == "old"


def test_what_killed_processes_left_of_a_file_goes_with_the_next_one(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leftovers = [f".tmp-{ended.pid}-file", f".old-{ended.pid}-file", f".tmp-{ended.pid}-other"]
    (tmp_path / leftovers[0]).write_text("half")
    (tmp_path / leftovers[1]).mkdir()
    (tmp_path / leftovers[2]).write_text("of another file")
    (tmp_path / f".tmp-{os.getppid()}-file").write_text("still written")
    with new_file(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    left = {leftovers[2], f".tmp-{os.getppid()}-file", "file"}
    assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ValueError), make(tmp_path / "new" / "deep" / "place"):
        raise ValueError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_an_error_that_names_no_file_gets_the_name_that_was_asked_for(
    tmp_path: Path, code: int
) -> None:
    with pytest.raises(OSError) as caught, new_file(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "file"))


@pytest.mark.parametrize("allocates", [True, False])
def test_a_sparse_file_gets_its_space_and_keeps_its_content(
    tmp_path: Path, allocates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path, size = tmp_path / "sparse", 3 * 2**20 + 5
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(size)
    reserve(path)
    assert path.stat().st_blocks * 512 >= size
    assert path.read_bytes() == b"head" + bytes(size - 4)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    place = tmp_path / "file" / "weights.npz"
    with pytest.raises(InputError, match=r"cannot write .*weights\.npz"), new_file(place):
        raise AssertionError("the body must not run")
    with (
        pytest.raises(InputError, match=r"cannot write .*Is a directory"),
        new_file(tmp_path) as temporary,
    ):
        temporary.write_text("a file where a folder stands")
    with pytest.raises(InputError, match=r"cannot write .*too long"), new_file("x" * 300) as long:
        long.write_text("never")


def test_a_full_disk_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    place = tmp_path / "weights.npz"
    with pytest.raises(OSError, match=r"weights\.npz") as caught, new_file(place) as temporary:
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(place)
    assert everything_in(tmp_path) == {}


def test_other_errors_of_the_writer_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    assert everything_in(tmp_path) == {}


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    with new_folder(place) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "config.json").write_text("{}")
        assert not place.exists()
    assert everything_in(tmp_path) == {"deep/model/inner/config.json": "{}"}


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    with pytest.raises(InputError, match=r"model exists; .* --force"), new_folder(place):
        raise AssertionError("the body must not run")
    check_free(tmp_path / "other", replace=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_free(tmp_path / "file", replace=True)


def test_a_replaced_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (place / "stale").write_text("old")
    with new_folder(place, replace=True) as temporary:
        (temporary / "fresh").write_text("new")
        assert everything_in(place) == {"stale": "old"}
    assert everything_in(tmp_path) == {"model/fresh": "new"}


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (place / "kept").write_text("old")
    with pytest.raises(ValueError), new_folder(place, replace=True) as temporary:
        (temporary / "half").write_text("new")
        raise ValueError
    assert everything_in(tmp_path) == {"model/kept": "old"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot fill")
def test_a_folder_that_takes_no_file_is_refused_early_even_to_root(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write /proc/new/file: /proc is not writable"):
        check_writable(Path("/proc/new/file"))
    check_writable(tmp_path / "new" / "file")
    assert everything_in(tmp_path) == {}
