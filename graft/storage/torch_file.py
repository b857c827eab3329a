"""Reads files written by `torch.save`, without PyTorch and without running pickled code.

A .pth or .bin file is a zip archive. Its `data.pkl` describes each tensor as a view of a storage,
and `data/KEY` holds the storages, uncompressed. A checkpoint is untrusted, and an ordinary
unpickler calls whatever the pickle names. So only the few names that a dictionary of tensors needs
are allowed, and a file with any other is refused.

Format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

import io
import itertools
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from graft.console import one_line
from graft.errors import InputError
from graft.storage.lazy_tensors import StoredTensor, check_total
from graft.storage.plain_file import open_plain
from graft.storage.zip_members import check_members, data_offset

import mlx.core as mx

STORAGE_DTYPES = {
    "FloatStorage": mx.float32,
    "HalfStorage": mx.float16,
    "BFloat16Storage": mx.bfloat16,
    "DoubleStorage": mx.float64,
    "LongStorage": mx.int64,
    "IntStorage": mx.int32,
    "ShortStorage": mx.int16,
    "CharStorage": mx.int8,
    "ByteStorage": mx.uint8,
    "BoolStorage": mx.bool_,
}
SAVE_AGAIN = "load it with PyTorch, if you trust it, and torch.save its state_dict() again"

# Files written by torch.save before version 1.6 begin with this pickled number.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


# Tuples: a pickle can overwrite the attributes of an object that has a __dict__ or __setstate__.
class _Storage(NamedTuple):
    key: str
    dtype: mx.Dtype
    elements: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch_file(path: Path | str) -> dict[str, StoredTensor]:
    """Find the tensors of a file without loading them; the checksums of all storages are compared.

    Returns:
        The tensors by name; entries that are not tensors are left out.

    Raises:
        InputError: the file is missing, damaged, in another format or without tensors by name, or
            it needs code to be run.
    """
    path = Path(path)
    _refuse_other_formats(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except InputError:
        raise
    except Exception as error:  # zipfile fails in many ways
        raise InputError(
            f"{path} is truncated or damaged ({one_line(error)}); fetch it again"
        ) from error


def _read_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
    members = {info.filename: info for info in check_members(archive, path)}
    root = _root_folder(path, members)
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise InputError(f"{path} was zipped again, compressed; fetch the original")
    if (bad := archive.testzip()) is not None:
        raise InputError(f"{path} is damaged: the checksum of {bad} is wrong; fetch it again")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise InputError(
            f"{path} holds big-endian numbers; {SAVE_AGAIN} on a little-endian machine"
        )
    content = _unpickle(path, archive.read(f"{root}data.pkl"))
    views = _views_by_name(path, content)
    with open_plain(path) as file:
        starts = {
            name.removeprefix(f"{root}data/"): (data_offset(file, info), info.file_size)
            for name, info in members.items()
            if name.startswith(f"{root}data/")
        }
    tensors = {name: _located(path, name, view, starts) for name, view in views.items()}
    # Views may overlap, as tied weights do, and repeat a number any number of times.
    check_total(tensors.values(), path)
    return tensors


def _refuse_other_formats(path: Path) -> None:
    with open_plain(path) as file:
        start = file.read(len(_LEGACY_START))
        file.seek(0)
        is_tar = start[:2] != b"PK" and tarfile.is_tarfile(file)
    if start == _LEGACY_START or is_tar:
        kind = "tar format (before 0.2)" if is_tar else "legacy format (before 1.6)"
        raise InputError(f"{path} is in PyTorch's {kind}, not its zip format; {SAVE_AGAIN}")
    if start[:4] != b"PK\3\4":
        raise InputError(f"{path} is not a PyTorch checkpoint: it does not begin like a zip file")


def _root_folder(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive that holds all members, with a slash at the end."""
    roots = [
        name.removesuffix("data.pkl") for name in members if name.partition("/")[2] == "data.pkl"
    ]
    if len(roots) != 1:
        raise InputError(
            f"{path} is not a PyTorch checkpoint: the archive holds {len(roots)} data.pkl, not 1"
        )
    if f"{roots[0]}constants.pkl" in members:
        raise InputError(f"{path} is a TorchScript program, not a checkpoint; {SAVE_AGAIN}")
    return roots[0]


def _unpickle(path: Path, pickled: bytes) -> Any:
    try:
        return _AllowListUnpickler(path, pickled).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        unknown = isinstance(error, KeyError)
        reason = "it does what tensors do not need" if unknown else one_line(error)[:200]
        raise InputError(f"{path} is damaged: data.pkl cannot be read ({reason})") from error


class _Entries(dict[Any, Any]):
    """A dictionary by name or number.

    A tuple as a key would be hashed: one that holds itself twice, 60 levels deep, takes forever.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float):
            raise ValueError(f"a {type(key).__name__} is the key of a dictionary")
        super().__setitem__(key, value)


# The unpickler in C would fill its memo up to any index that the pickle names, and hash any key.
class _AllowListUnpickler(pickle._Unpickler):
    """Makes dictionaries, lists, tuples, texts and numbers, and calls what `find_class` allows."""

    append: Callable[[Any], None]
    stack: list[Any]

    def __init__(self, path: Path, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._path = path

    def _load_empty_dictionary(self) -> None:
        self.append(_Entries())

    def _load_build(self) -> None:
        """Leave out the attributes of a dictionary, such as the versions in a state_dict."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Entries):
            raise ValueError("attributes of something that has none")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
        for opcode in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.LONG1),
            *(pickle.LONG, pickle.BININT, pickle.BININT1, pickle.BININT2),
            *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES),
            *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.MEMOIZE, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
            *(pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL),
            *(pickle.BINPERSID, pickle.REDUCE),
        )
    } | {pickle.EMPTY_DICT[0]: _load_empty_dictionary, pickle.BUILD[0]: _load_build}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        allowed = {
            ("collections", "OrderedDict"): _Entries,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise InputError(
                f"{self._path} is refused: it names {module}.{name}, which plain tensors do not "
                f"need and which could run any code; {SAVE_AGAIN}"
            )
        return allowed[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, elements = identity
        if kind != "storage" or not isinstance(dtype, mx.Dtype):
            raise ValueError("a storage of an unknown kind")
        if not isinstance(key, str | int) or not isinstance(elements, int):
            raise ValueError("a storage without a key or a size")
        return _Storage(str(key), dtype, elements)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> _View:
    # rest: requires_grad, backward_hooks and, for a conjugated or negated view, a dictionary.
    if len(rest) > 2 and rest[2]:
        raise ValueError("a conjugated or negated view")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(view: _View, *rest: Any) -> _View:
    return view


def _views_by_name(path: Path, content: Any) -> dict[str, _View]:
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {_kind(content)}, not tensors by name; save a state_dict()"
        )
    views = {str(name): value for name, value in content.items() if isinstance(value, _View)}
    if not views:
        keys = ", ".join(str(key)[:60] for key in itertools.islice(content, 20)) or "none"
        raise InputError(
            f"{path} holds no tensors by name (its keys: {keys}); save the state_dict() alone"
        )
    return views


def _kind(content: Any) -> str:
    return "tensor" if isinstance(content, _View) else type(content).__name__


def _located(
    path: Path, name: str, view: _View, starts: Mapping[str, tuple[int, int]]
) -> StoredTensor:
    """A view as a tensor in the file, checked to stay inside its storage."""
    storage, offset, shape, strides = view
    numbers = (offset, *shape, *strides)
    valid = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not valid or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise InputError(f"{path} is damaged: {name} is not a valid view of a storage")
    start, size = starts.get(storage.key, (0, -1))
    if size != storage.elements * storage.dtype.size:
        raise InputError(
            f"{path} is damaged: the storage {storage.key} of {name} is missing or cut off"
        )
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.elements:
        raise InputError(f"{path} is damaged: {name} reaches beyond its storage")
    return StoredTensor(path, start + offset * storage.dtype.size, storage.dtype, shape, strides)
