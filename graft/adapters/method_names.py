"""The names of the methods without importing MLX, for `--help`."""

from pathlib import Path


def method_names() -> tuple[str, ...]:
    """Names of the methods to choose from: the modules of `graft/adapters/methods`."""
    modules = (Path(__file__).parent / "methods").glob("[!_]*.py")
    return tuple(sorted(path.stem.replace("_", "-") for path in modules))
