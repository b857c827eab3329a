"""Tensors that stay on disk until some of their rows are read.

A checkpoint of any format is a mapping from names to `LazyTensor`s, so converting a model takes
memory for a few rows instead of for all of it. The modules for the formats find out where each
tensor is; this one reads it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from graft.errors import InputError

import mlx.core as mx
import numpy as np

BLOCK_BYTES = 1 << 23
# Limits of MLX's and NumPy's arrays.
LARGEST_DIMENSION, MOST_DIMENSIONS = 2**31, 16
# How many times larger than its file tensors may be: packed, or views of the same numbers.
LARGEST_EXPANSION = 16

# NumPy has no bfloat16: its words are read as 16-bit integers, which MLX views as bfloat16.
NUMPY_NAMES = {
    mx.bool_: "?",
    mx.uint8: "u1",
    mx.int8: "i1",
    mx.uint16: "<u2",
    mx.int16: "<i2",
    mx.uint32: "<u4",
    mx.int32: "<i4",
    mx.uint64: "<u8",
    mx.int64: "<i8",
    mx.float16: "<f2",
    mx.bfloat16: "<u2",
    mx.float32: "<f4",
    mx.float64: "<f8",
}


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension; empty for a scalar."""
        ...


class Typed(Shaped, Protocol):
    """Anything with a shape and a type of elements."""

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the elements."""
        ...


class LazyTensor(Typed, Protocol):
    """A tensor that can be read in blocks of rows."""

    def rows(self, start: int, stop: int) -> mx.array:
        """Indices start to stop - 1 of the first dimension; a scalar ignores both."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, uncompressed and possibly strided.

    Args:
        path: the file.
        offset_bytes: position of the first element in the file.
        dtype: type of the elements, little-endian in the file.
        shape: size of each dimension.
        strides: distance of neighbors along each dimension, in elements.
        float8: the name of the type, if the bytes are 8-bit floats.
    """

    path: Path
    offset_bytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    float8: str = ""

    def __post_init__(self) -> None:
        check_shape(self.shape)

    def rows(self, start: int, stop: int) -> mx.array:
        """Indices start to stop - 1 of the first dimension, read from the file."""
        shape, offset = self.shape, self.offset_bytes
        if shape:
            shape = (stop - start, *shape[1:])
            offset += start * self.strides[0] * self.dtype.size
        if 0 in shape:
            return mx.zeros(shape, self.dtype)
        # Mapped for this read only, so that pages of the file do not add up in resident memory.
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(shape, self.strides, strict=True)
        )
        numpy_dtype = np.dtype(NUMPY_NAMES[self.dtype])
        mapped = np.memmap(self.path, numpy_dtype, mode="r", offset=offset, shape=(span,))
        strides = [
            stride * numpy_dtype.itemsize if size > 1 else 0  # one of a single index can be any
            for size, stride in zip(shape, self.strides, strict=True)
        ]
        array = mx.array(
            np.array(np.lib.stride_tricks.as_strided(mapped, shape, strides)), self._read_as
        )
        return array.view(self.dtype) if self._read_as != self.dtype else array

    @property
    def _read_as(self) -> mx.Dtype:
        return mx.uint16 if self.dtype == mx.bfloat16 else self.dtype


@dataclass(frozen=True)
class JoinedTensor:
    """Parts of one tensor, concatenated along a dimension."""

    parts: tuple[LazyTensor, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The parts' shape with their sizes added up along `axis`."""
        first = self.parts[0].shape
        return tuple(
            sum(part.shape[axis] for part in self.parts) if axis == self.axis else size
            for axis, size in enumerate(first)
        )

    @property
    def dtype(self) -> mx.Dtype:
        """The parts' type."""
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> mx.array:
        """Indices start to stop - 1 of the first dimension."""
        if self.axis > 0:
            return mx.concatenate([part.rows(start, stop) for part in self.parts], self.axis)
        chosen, first = [], 0
        for part in self.parts:
            size = part.shape[0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                chosen.append(part.rows(low, high))
            first += size
        return mx.concatenate(chosen) if chosen else self.parts[0].rows(0, 0)


@dataclass(frozen=True)
class StackedTensor:
    """Tensors of one shape, stacked along a new first dimension."""

    parts: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of parts, *shape of a part)."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> mx.Dtype:
        """The parts' type."""
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> mx.array:
        """Parts start to stop - 1."""
        if start == stop:
            return mx.zeros((0, *self.shape[1:]), self.dtype)
        return mx.stack([read(part) for part in self.parts[start:stop]])


@dataclass(frozen=True)
class ComputedTensor:
    """An array that MLX may not have evaluated yet; reading any rows evaluates all of it."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the elements."""
        return self.array.dtype

    def rows(self, start: int, stop: int) -> mx.array:
        """Indices start to stop - 1 of the first dimension."""
        return self.array[start:stop] if self.shape else self.array


class Output(NamedTuple):
    """A tensor to write, as blocks of rows that are made only when they are written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    blocks: Iterator[mx.array]

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.size

    def raw(self, block: mx.array) -> memoryview:
        """The bytes of a block."""
        # The header with the type is written already, and the file would be read by it.
        assert block.dtype == self.dtype, f"{self.name}: {block.dtype}, not {self.dtype}"
        return memoryview(block.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]


def read(tensor: LazyTensor) -> mx.array:
    """The whole tensor."""
    return tensor.rows(0, tensor.shape[0] if tensor.shape else 1)


def blocks(tensor: LazyTensor) -> Iterator[mx.array]:
    """Yield a tensor in order, as many rows at a time as fit `BLOCK_BYTES`, and at least one."""
    if not tensor.shape:
        yield read(tensor)
        return
    row_bytes = tensor.dtype.size * math.prod(tensor.shape[1:])
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0]))


@contextmanager
def without_buffer_cache() -> Iterator[None]:
    """Make MLX release freed buffers at once; it would keep some of every size that occurs."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def size_bytes(tensor: LazyTensor) -> int:
    """Bytes of a tensor's elements."""
    return math.prod(tensor.shape) * tensor.dtype.size


def check_shape(shape: Sequence[Any]) -> None:
    """Refuse a shape from a file that no array has.

    Raises:
        ValueError: a dimension is not a whole number below 2**31, or there are too many.
    """
    if len(shape) > MOST_DIMENSIONS or not all(
        type(size) is int and 0 <= size < LARGEST_DIMENSION for size in shape
    ):
        raise ValueError(f"the shape {str(shape)[:80]}")


def check_total(tensors: Iterable[LazyTensor], path: Path) -> None:
    """Refuse tensors of a file that take far more bytes than the file has, which views can.

    Raises:
        ValueError: they take more than `LARGEST_EXPANSION` times the bytes of the file.
    """
    total, file_bytes = sum(map(size_bytes, tensors)), path.stat().st_size
    if total > LARGEST_EXPANSION * file_bytes:
        raise ValueError(f"{total} bytes of tensors in a file of {file_bytes}")


def check_fit(expected: Mapping[str, Typed], actual: Mapping[str, Typed], source: str) -> None:
    """Compare the tensors of a model and of its checkpoint by name, shape and type.

    Args:
        expected: the model's.
        actual: the checkpoint's.
        source: the checkpoint, for the message.

    Raises:
        InputError: tensors are missing, unknown, of another shape, or of integers in place of
            floats; all of them are named.
    """
    problems = [f"{name} is missing" for name in expected if name not in actual]
    problems += [
        f"{name} is not part of this architecture" for name in actual if name not in expected
    ]
    problems += [
        f"{name} has shape {tuple(actual[name].shape)}, not {tuple(array.shape)}"
        for name, array in expected.items()
        if name in actual and tuple(actual[name].shape) != tuple(array.shape)
    ]
    problems += [
        f"{name} has type {str(actual[name].dtype).rpartition('.')[2]}, which is not a float"
        for name, array in expected.items()
        if name in actual
        if mx.issubdtype(array.dtype, mx.floating)
        if not mx.issubdtype(actual[name].dtype, mx.floating)
    ]
    if problems:
        raise InputError(
            f"the weights in {source} do not fit its configuration: {'; '.join(problems)}"
        )
