"""Only regular files are opened."""

import os
import socket
from pathlib import Path

from graft.errors import InputError
from graft.storage.plain_file import open_plain, read_plain_text

import pytest


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        open_plain(path)
    return str(refused.value)


def test_text_has_no_byte_order_mark_and_its_lines_end_alike(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_plain_text(tmp_path / "a") == "a\nb\nc\n"


def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    os.symlink("loop", "loop")
    for name in ("pipe", "socket", "/dev/zero", "/dev/null"):
        assert "a pipe, a socket or a device" in refusal(Path(name))
    assert "a folder" in refusal(tmp_path)
    assert "is missing" in refusal(Path("none"))
    assert "is missing" in refusal(Path("/dev/null/file"))
    assert "File name too long" in refusal(Path("a" * 300))
    assert "symbolic links" in refusal(Path("loop"))
    assert "null byte" in refusal(Path("a\0b"))
