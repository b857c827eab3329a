import os
from pathlib import Path

import graft  # noqa: F401
from graft.data import token_cache

import numpy as np
import pytest

ARRAYS = {"tokens": np.arange(1000, dtype=np.int32), "loss_mask": np.arange(1000) % 3 == 0}
RECORD = {"cut": 2, "shapes": {"texts": 5}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_an_entry_comes_back_as_it_was(cache: Path) -> None:
    assert token_cache.read_entry("a1") is None
    token_cache.write_entry("a1", ARRAYS, RECORD)
    found = token_cache.read_entry("a1")
    assert found is not None
    arrays, record = found
    assert record == RECORD
    assert arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert [arrays[name].dtype for name in ARRAYS] == [np.int32, np.bool_]
    assert token_cache.read_entry("a2") is None
    assert [path.name for path in cache.iterdir()] == ["a1.npz"]


@pytest.mark.parametrize("damage", ["empty", "torn", "text", "missing", *range(0, 6000, 487)])
def test_a_damaged_entry_counts_as_missing_and_is_told(
    cache: Path, capsys: pytest.CaptureFixture[str], damage: str | int
) -> None:
    token_cache.write_entry("a1", ARRAYS, RECORD)
    path = cache / "a1.npz"
    raw = bytearray(path.read_bytes())
    if isinstance(damage, int):
        raw[damage] ^= 0x55
    contents = {"empty": b"", "torn": bytes(raw[: len(raw) // 2]), "text": b"not an entry"}
    path.write_bytes(contents.get(str(damage), bytes(raw)))
    if damage == "missing":
        np.savez(path, **ARRAYS)
    found = token_cache.read_entry("a1")
    said = capsys.readouterr().err
    if found is None:
        assert said.count("\n") == 1
        assert f"{path} is damaged" in said
    else:  # A bit that no reader looks at, such as a date in the zip.
        assert isinstance(damage, int)
        assert np.array_equal(found[0]["tokens"], ARRAYS["tokens"])
        assert np.array_equal(found[0]["loss_mask"], ARRAYS["loss_mask"])
        assert found[1] == RECORD
    token_cache.write_entry("a1", ARRAYS, RECORD)
    assert token_cache.read_entry("a1") is not None


def test_what_was_not_used_for_longest_goes_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("one", "two", "three")):
        token_cache.write_entry(name, ARRAYS, RECORD)
        os.utime(cache / f"{name}.npz", (number, number))
    assert token_cache.read_entry("one") is not None  # now it is the last one used
    size = (cache / "one.npz").stat().st_size
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 3 * size)
    token_cache.write_entry("four", ARRAYS, RECORD)
    assert {path.stem for path in cache.iterdir()} == {"one", "three", "four"}
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 1)
    token_cache.write_entry("five", ARRAYS, RECORD)
    assert {path.stem for path in cache.iterdir()} == {"five"}


def test_a_place_that_cannot_be_written_is_told_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file"))
    token_cache.write_entry("a1", ARRAYS, RECORD)
    said = capsys.readouterr().err
    assert said.startswith("note: the tokens are not cached") and said.count("\n") == 1
    assert token_cache.read_entry("a1") is None


def test_the_place_is_the_user_s_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GRAFT_CACHE", raising=False)
    assert token_cache.cache_folder() == tmp_path / ".cache" / "graft" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert token_cache.cache_folder() == Path("/x/graft/tokens")
    monkeypatch.setenv("GRAFT_CACHE", "/y")
    assert token_cache.cache_folder() == Path("/y/tokens")


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GRAFT_CACHE", "off")
    token_cache.write_entry("a1", ARRAYS, RECORD)
    assert token_cache.read_entry("a1") is None
    assert list(tmp_path.iterdir()) == []
