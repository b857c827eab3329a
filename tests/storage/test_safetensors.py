"""What is written piece by piece reads back in MLX, numpy and safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.lazy_tensors import ComputedTensor, Output, StoredTensor, blocks, read
from graft.storage.npz import write_npz
from graft.storage.safetensors import open_safetensors, write_safetensors

import mlx.core as mx
import numpy as np
import pytest

mx.random.seed(0)
ARRAYS = {
    "bfloat16": mx.random.normal((6, 5)).astype(mx.bfloat16),
    "float16 scalar": mx.array(3.5, mx.float16),
    "empty": mx.zeros((0, 4)),
    "uint32": mx.arange(7, dtype=mx.uint32),
    "bool": mx.array([True, False, True]),
    "float32 cube": mx.random.normal((2, 3, 4)),
    "int8": mx.array([-1, 127], mx.int8),
    "int64": mx.array([-(2**40)], mx.int64),
}


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """All arrays, in blocks of one or two rows."""
    monkeypatch.setattr("graft.storage.lazy_tensors.BLOCK_BYTES", 20)
    return [
        Output(name, array.dtype, tuple(array.shape), blocks(ComputedTensor(array)))
        for name, array in ARRAYS.items()
    ]


def assert_equal(found: dict[str, mx.array]) -> None:
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array), name


def test_an_npz_reads_back_in_mlx_and_numpy(tmp_path: Path, outputs: list[Output]) -> None:
    write_npz(tmp_path / "w.npz", outputs)
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


def test_a_safetensors_file_reads_back_in_mlx_and_here(
    tmp_path: Path, outputs: list[Output]
) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, outputs)
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert_equal(loaded)
    assert metadata == {"format": "mlx"}
    assert_equal({name: read(tensor) for name, tensor in open_safetensors(path).items()})


def test_the_safetensors_library_accepts_the_file(tmp_path: Path, outputs: list[Output]) -> None:
    safetensors = pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "w.safetensors", outputs)
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
    with pytest.raises(InputError, match="truncated or no safetensors file"):
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


def test_stored_float64_reads_as_it_is(tmp_path: Path) -> None:
    numbers = np.array([0.1, 1e300])
    (tmp_path / "raw").write_bytes(b"xxx" + numbers.tobytes())
    tensor = StoredTensor(tmp_path / "raw", 3, mx.float64, (2,), (1,))
    assert np.array(read(tensor)).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("write", [write_npz, write_safetensors])
def test_a_block_of_another_dtype_than_its_header_tells_is_not_written(
    write: Any, tmp_path: Path
) -> None:
    half = Output("a", mx.float16, (2,), iter([mx.ones(2)]))
    with pytest.raises(AssertionError, match="float32, not mlx"):
        write(tmp_path / "a", [half])
