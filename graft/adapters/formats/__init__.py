"""Adapters in every form that other tools have: found by content, read, and written.

Every reader gives an `Adapter` and every writer takes one, so that each form needs one of each.
Graft's own files are `graft.adapters.files`' matter.
"""

from collections.abc import Callable
from pathlib import Path

from graft.adapters.factors import Adapter
from graft.adapters.formats.ggla import MAGIC as GGLA_MAGIC
from graft.adapters.formats.ggla import read_ggla
from graft.adapters.formats.gguf import MAGIC as GGUF_MAGIC
from graft.adapters.formats.gguf import read_gguf, write_gguf
from graft.adapters.formats.mlx_lm import read_mlx_lm, write_mlx_lm
from graft.adapters.formats.npz import read_npz
from graft.adapters.formats.peft import read_peft, write_peft
from graft.errors import InputError
from graft.storage.json_file import read_json

__all__ = ["READERS", "WRITERS", "Adapter", "detect", "find_file", "read_adapter"]

CONFIG = "adapter_config.json"
# What a folder's adapter may be called, in the order in which it is looked for.
FILES = (
    *("adapters.safetensors", "adapters.npz", "adapter_model.safetensors", "adapter_model.bin"),
    "ggml-adapter-model.bin",
)
READERS: dict[str, Callable[[Path], Adapter]] = {
    "npz": read_npz,
    "mlx-lm": read_mlx_lm,
    "peft": read_peft,
    "gguf": read_gguf,
    "ggla": read_ggla,
}
WRITERS = {"mlx-lm": write_mlx_lm, "peft": write_peft, "gguf": write_gguf}


def find_file(path: Path) -> Path:
    """The file with the tensors, where a folder is named.

    Raises:
        InputError: there is no adapter, or more than one.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    found = found or sorted(path.glob("*.gguf"))
    if not found:
        raise InputError(f"{path} holds no adapter: none of {', '.join(FILES)} or *.gguf")
    if len(found) > 1:
        raise InputError(f"{path} holds {', '.join(file.name for file in found)}: name one of them")
    return found[0]


def detect(path: Path) -> str:
    """The form of an adapter file, by its content and the configuration beside it.

    Returns:
        "graft" or a key of `READERS`.

    Raises:
        InputError: it is none of them.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if start == GGUF_MAGIC:
        return "gguf"
    if start == GGLA_MAGIC:
        return "ggla"
    where = path.with_name(CONFIG)
    config = read_json(where) if where.is_file() else {}
    if "format" in config:
        return "graft"
    if "peft_type" in config:
        return "peft"
    if start[:2] == b"PK":
        return "npz"
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "mlx-lm"
    if not config:
        raise InputError(f"{path} does not tell what it is, and {where} is missing")
    raise InputError(f"{where} tells of no adapter that Graft knows: {', '.join(READERS)}")


def read_adapter(path: Path, *, alpha: float | None = None) -> Adapter:
    """Read an adapter of another tool.

    Args:
        path: the file with the tensors.
        alpha: numerator of the scale for a file that does not tell; otherwise it is not used.

    Raises:
        InputError: the file is damaged, or asks for what Graft does not do.
    """
    form = detect(path)
    if form not in READERS:
        raise InputError(f"{path} is Graft's own")
    try:
        return read_npz(path, alpha=alpha) if form == "npz" else READERS[form](path)
    except InputError as error:
        if str(path.parent) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error
