"""Writes checkpoints in PyTorch's zip format without PyTorch, sound ones and others."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def save(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """What `torch.save` makes of a dictionary of tensors, each in a storage of its own."""
    views = [
        view(name, array.shape, key=str(index), elements=array.size, storage=_storage(array))
        for index, (name, array) in enumerate(tensors.items())
    ]
    storages = {str(index): array.tobytes() for index, array in enumerate(tensors.values())}
    return write(path, dictionary(*views), storages)


def write(path: Path, pickled: bytes, storages: Mapping[str, bytes], **options: Any) -> Path:
    """Put a pickle and storages into the zip that PyTorch reads."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def dictionary(*entries: bytes) -> bytes:
    """The pickle of a dictionary with these entries."""
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def view(
    name: str,
    shape: tuple[int, ...],
    *,
    key: str = "0",
    elements: int,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
    storage: str = "FloatStorage",
) -> bytes:
    """The entry of a dictionary that says which part of which storage a tensor is."""
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    identity = _text("storage") + _named("torch", storage) + _text(key) + _text("cpu")
    hooks = _named("collections", "OrderedDict") + b")R"
    place = _integer(offset) + _numbers(shape) + _numbers(strides)
    rebuilt = b"((" + identity + _integer(elements) + b"tQ" + place + b"\x89" + hooks + b"tR"
    return _text(name) + _named("torch._utils", "_rebuild_tensor_v2") + rebuilt


def call(module: str, name: str, *arguments: str) -> bytes:
    """Code that calls a function when it is unpickled."""
    return _named(module, name) + b"(" + b"".join(map(_text, arguments)) + b"tR"


def entry(name: str, value: bytes) -> bytes:
    """The entry of a dictionary whose value is made by `value`."""
    return _text(name) + value


def _storage(array: np.ndarray[Any, Any]) -> str:
    return STORAGES[array.dtype.name]


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _integer(number: int) -> bytes:
    return f"L{number}L\n".encode()


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"
