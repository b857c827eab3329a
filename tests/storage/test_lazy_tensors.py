from pathlib import Path
from typing import Any

from graft.storage.lazy_tensors import Output, StoredTensor, read
from graft.storage.npz import write_npz
from graft.storage.safetensors import write_safetensors

import mlx.core as mx
import numpy as np
import pytest


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
