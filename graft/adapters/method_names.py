"""The names of the methods without importing MLX, for `--help`."""

from pathlib import Path


def method_names() -> tuple[str, ...]:
    """Names of the methods in `graft/adapters/methods`, from the names of its modules."""
    modules = (Path(__file__).parent / "methods").glob("[!_]*.py")
    return tuple(sorted(path.stem.replace("_", "-") for path in modules))
