"""Finds installed packages and standard-library modules: their files, versions and licences.

Imports none of them, and opens none of their files.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_PYTHON_LICENCE = "PSF-2.0"
_LONGEST_LICENCE = 60  # longer metadata is the licence's whole text


@dataclass(frozen=True)
class Package:
    """A package to read.

    Attributes:
        root: the dotted path asked for, such as ``mlx`` or ``mlx.nn``.
        version: the distribution's, or Python's for its standard library, else "unknown".
        licence: as the distribution states it.
    """

    root: str
    version: str
    licence: str

    @property
    def name(self) -> str:
        """The top-level package."""
        return top_level(self.root)


@dataclass
class Files:
    """What a module is made of; `compiled` where only running it tells what it holds."""

    source: Path | None = None
    stub: Path | None = None
    compiled: bool = False


def find_packages(names: Iterable[str]) -> tuple[list[Package], list[str]]:
    """Look packages up by import name, dotted ones too, or by distribution ("PyYAML").

    Returns:
        The packages, each once, and the names under which nothing is installed.
    """
    roots: dict[str, list[str]] = {
        name: [name] if find_files(name) else _imports_of(name) for name in names
    }
    found = list(dict.fromkeys(root for those in roots.values() for root in those))
    outermost = [root for root in found if not any(root.startswith(f"{one}.") for one in found)]
    missing = [name for name, those in roots.items() if not those]
    return [Package(root, *_version_and_licence(root)) for root in outermost], missing


def find_files(root: str) -> dict[str, Files]:
    """The modules at and below a dotted path; empty where there are none."""
    spec = _find_spec(top_level(root)) if all(map(str.isidentifier, root.split("."))) else None
    found: dict[str, Files] = {}
    if spec is None:
        return found
    if spec.submodule_search_locations is not None:
        for folder in spec.submodule_search_locations:
            for path, file in _walk(Path(folder), spec.name):
                _add_file(found, path, file)
    elif spec.origin and spec.origin.endswith(".py"):
        source = Path(spec.origin)
        stub = source.with_suffix(".pyi")
        found[spec.name] = Files(source, stub if stub.exists() else None)
    else:
        found[spec.name] = Files(compiled=True)
    return {path: those for path, those in found.items() if f"{path}.".startswith(f"{root}.")}


def have_same_owner(first: str, second: str) -> bool:
    """Whether two top-level packages come from one distribution, or both with Python."""
    if {first, second} <= sys.stdlib_module_names:
        return True
    return bool(set(_owners().get(first, ())) & set(_owners().get(second, ())))


def top_level(path: str) -> str:
    """The package that a dotted path begins with."""
    return path.partition(".")[0]


def _find_spec(name: str) -> ModuleSpec | None:
    """Where a top-level module is, without importing it."""
    # Frozen modules have sources all the same, which only the search of the path tells.
    spec = None if name in sys.builtin_module_names else PathFinder.find_spec(name)
    with contextlib.suppress(ImportError, ValueError):
        return spec or importlib.util.find_spec(name)
    return None


def _walk(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    """Every file that might be a module, with its dotted path, in a fixed order."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name.isidentifier() and name != "__pycache__"
        )
        below = ".".join([package, *Path(here).relative_to(folder).parts])
        for file in sorted(files):
            stem = file.partition(".")[0]
            if stem.isidentifier():
                yield below if stem == "__init__" else f"{below}.{stem}", Path(here, file)


def _add_file(found: dict[str, Files], path: str, file: Path) -> None:
    extension = "." + file.name.partition(".")[2]
    files = found.get(path, Files())
    if extension == ".py":
        files.source = files.source or file
    elif extension == ".pyi":
        files.stub = files.stub or file
    elif extension in EXTENSION_SUFFIXES and not file.name.startswith("lib"):
        files.compiled = True  # a plain .so named lib... is a library that modules link to
    else:
        return
    found[path] = files


def _imports_of(distribution: str) -> list[str]:
    """The public packages that a distribution installs."""
    wanted = _normalised(distribution)
    return sorted(
        name
        for name, owners in _owners().items()
        if not name.startswith("_") and wanted in map(_normalised, owners) and find_files(name)
    )


def _version_and_licence(root: str) -> tuple[str, str]:
    top = top_level(root)
    owners = sorted(set(_owners().get(top, ())), key=lambda one: (_normalised(one) != top, one))
    sure = [owner for owner in owners if _installs(owner, root)]
    if not sure and top in sys.stdlib_module_names:
        return platform.python_version(), _PYTHON_LICENCE
    if not owners:
        return "unknown", "not stated"
    distribution = metadata.distribution((sure or owners)[0])
    return distribution.version, _licence(distribution.metadata)


def _installs(owner: str, root: str) -> bool:
    """Whether a distribution lists files of a package; one in development does not."""
    folder = root.replace(".", "/")
    files = map(str, metadata.distribution(owner).files or ())
    return any(file.startswith((f"{folder}/", f"{folder}.")) for file in files)


def _licence(fields: Any) -> str:
    for field in ("License-Expression", "License"):
        text = str(fields.get(field) or "").strip()
        if 0 < len(text) <= _LONGEST_LICENCE and "\n" not in text:
            return text
    classifiers = [str(one) for one in fields.get_all("Classifier") or ()]
    named = [one.rpartition(" :: ")[2] for one in classifiers if one.startswith("License ::")]
    return ", ".join(named) or "not stated"


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """The distributions that install each top-level name."""
    return metadata.packages_distributions()


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
