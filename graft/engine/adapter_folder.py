"""Finds the adapters in a folder and loads them into an engine."""

from pathlib import Path

from graft.adapters.formats import file_patterns, file_suffixes, find_file
from graft.engine.engine import Engine
from graft.errors import InputError, first_line


def load_all(engine: Engine, folder: str | Path | None, *, limit: int) -> list[str]:
    """Load the adapters in a folder.

    Args:
        engine: loads them.
        folder: contains adapters, each a folder or a file, or is itself an adapter; `None` loads
            nothing.
        limit: how many adapters to load at most; the others are reported.

    Returns:
        One line for each adapter, loaded or left out.

    Raises:
        InputError: the folder does not exist, or none of its adapters can be loaded.
    """
    if folder is None:
        return []
    adapters = find_adapters(Path(folder))
    loaded: list[str] = []
    left_out: list[str] = []
    for name, path in adapters.items():
        if len(loaded) == limit:
            left_out.append(f"not loaded: {name}: already at --max-adapters {limit}")
            continue
        try:
            info = engine.load_adapter(name, path)
        except InputError as error:
            left_out.append(f"not loaded: {name}: {first_line(error)}")
        else:
            loaded.append(f"adapter {info.id}: {name}, rank {info.rank}")
    if adapters and not loaded:
        raise InputError(f"no adapter in {folder} can be loaded: {'; '.join(left_out)}")
    return [*loaded, *left_out]


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder, by name: the folder itself, or the folders and files in it.

    Raises:
        InputError: the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"--adapters {folder} is not a folder")
    if _is_adapter(folder):
        return {folder.resolve().name: folder.resolve()}
    paths = sorted(path for path in folder.resolve().iterdir() if not path.name.startswith("."))
    paths = [path for path in paths if _holds_adapter(path)]
    return {path.name if path.is_dir() else path.stem: path for path in paths}


def _is_adapter(folder: Path) -> bool:
    try:
        find_file(folder)
    except InputError:
        return False
    return True


def _holds_adapter(path: Path) -> bool:
    """Whether a path is an adapter; also a folder with several files, whose reason is reported."""
    if path.is_file():
        return path.suffix in file_suffixes()
    return any(file.is_file() for pattern in file_patterns() for file in path.glob(pattern))
