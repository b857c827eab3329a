"""Safetensors files written piece by piece read back in MLX and in the safetensors library."""

from collections.abc import Iterator
from pathlib import Path

from graft.errors import InputError
from graft.storage.lazy_tensors import Output, read
from graft.storage.safetensors import open_safetensors, write_safetensors

import mlx.core as mx
import numpy as np
import pytest

from support.arrays import ARRAYS, assert_equal, outputs


def test_a_safetensors_file_reads_back_in_mlx_and_here(tmp_path: Path, small_blocks: None) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, outputs())
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert_equal(loaded)
    assert metadata == {"format": "mlx"}
    assert_equal({name: read(tensor) for name, tensor in open_safetensors(path).items()})


def test_the_safetensors_library_accepts_the_file(tmp_path: Path, small_blocks: None) -> None:
    safetensors = pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "w.safetensors", outputs())
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:
        assert set(file.keys()) == set(ARRAYS)
        np.testing.assert_array_equal(file.get_tensor("float32 cube"), ARRAYS["float32 cube"])


def test_a_block_is_made_only_when_the_one_before_is_written(tmp_path: Path) -> None:
    sizes = []

    def rows() -> Iterator[mx.array]:
        for _ in range(3):
            sizes.append((tmp_path / "w.safetensors").stat().st_size)
            yield mx.ones((1, 1 << 18))

    write_safetensors(tmp_path / "w.safetensors", [Output("w", mx.float32, (3, 1 << 18), rows())])
    assert sizes[2] - sizes[1] == 1 << 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x40\0\0\0\0\0\0\0{}",
        b'\x0b\0\0\0\0\0\0\0{"a": null}',
        b"\xff" * 20,
    ],
)
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        open_safetensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [2], [0, 12]),
        ("F32", [3], [4, 16]),
        ("F32", [-3], [0, 12]),
        ("F32", [2], [8, 0]),
        ("F99", [3], [0, 12]),
    ],
)
def test_a_safetensors_entry_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, dtype: str, shape: list[int], offsets: list[int]
) -> None:
    entry = f'{{"w": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}'
    head = len(entry).to_bytes(8, "little") + entry.encode()
    (tmp_path / "w.safetensors").write_bytes(head + bytes(12))
    with pytest.raises(InputError, match="fetch it again"):
        open_safetensors(tmp_path / "w.safetensors")
