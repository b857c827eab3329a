"""Npz files written piece by piece read back in MLX and NumPy; theirs read here."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from graft.errors import InputError
from graft.storage.lazy_tensors import Output, StoredTensor, read
from graft.storage.npz import load_npz, open_npz, write_npz

import mlx.core as mx
import numpy as np
import pytest

from support.arrays import ARRAYS, assert_equal, outputs


def test_an_npz_reads_back_in_mlx_and_numpy(tmp_path: Path, small_blocks: None) -> None:
    write_npz(tmp_path / "w.npz", outputs())
    loaded = mx.load(str(tmp_path / "w.npz"))
    assert isinstance(loaded, dict)
    assert_equal(loaded)
    np.testing.assert_array_equal(
        np.load(tmp_path / "w.npz")["float32 cube"], ARRAYS["float32 cube"]
    )


def test_an_npz_is_byte_for_byte_what_mlx_writes_in_its_members(tmp_path: Path) -> None:
    array = ARRAYS["bfloat16"]
    output = Output("w", array.dtype, tuple(array.shape), iter([array]))
    write_npz(tmp_path / "ours.npz", [output])
    mx.savez(str(tmp_path / "mlx.npz"), w=array)
    ours, theirs = (np.load(tmp_path / f"{name}.npz")["w"] for name in ("ours", "mlx"))
    assert ours.dtype == theirs.dtype
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_numpy_is_read_whole_and_in_place(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "rows": cube,
        "columns": np.asfortranarray(cube),
        "flags": cube > 5,
        "scalar": cube[0, 0, 1],
    }
    save(tmp_path / "a.npz", **arrays)
    loaded, opened = load_npz(tmp_path / "a.npz"), open_npz(tmp_path / "a.npz")
    assert all(isinstance(t, StoredTensor) for t in opened.values()) == (save is np.savez)
    for name, array in arrays.items():
        for found in (loaded[name], read(opened[name])):
            assert found.shape == array.shape
            np.testing.assert_array_equal(np.array(found), array)


def test_an_npz_of_mlx_is_read_in_place(tmp_path: Path) -> None:
    mx.savez(str(tmp_path / "a.npz"), **ARRAYS)
    assert_equal({name: read(tensor) for name, tensor in open_npz(tmp_path / "a.npz").items()})
    assert_equal(load_npz(tmp_path / "a.npz"))


@pytest.mark.parametrize("array", [np.arange(3, dtype=">f4"), np.array([None, "text"])])
def test_arrays_that_are_not_little_endian_numbers_are_refused(
    tmp_path: Path, array: np.ndarray
) -> None:
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(InputError, match="not little-endian numbers"):
        open_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="not little-endian numbers"):
        load_npz(tmp_path / "a.npz")


def test_a_header_that_does_not_fit_its_content_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    content = (tmp_path / "a.npy").read_bytes().replace(b"(3,)", b"(4,)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(InputError, match=r"in shape \(4,\) and has 24 bytes"):
        open_npz(tmp_path / "a.npz")
