"""Finds installed packages and standard-library modules: their files, versions and licences.

It neither imports them nor opens their files.
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
_LONGEST_LICENCE = 60  # longer metadata is the full text of the licence


@dataclass(frozen=True)
class Package:
    """A package to read.

    Attributes:
        root: the requested dotted path, such as ``mlx`` or ``mlx.nn``.
        version: the distribution's version, Python's for the standard library, or "unknown".
        licence: the licence that the distribution states.
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
    """The files of a module; `compiled` if only importing it shows its members."""

    source: Path | None = None
    stub: Path | None = None
    compiled: bool = False


def find_packages(names: Iterable[str]) -> tuple[list[Package], list[str]]:
    """Look up packages by import name, dotted or not, or by distribution ("PyYAML").

    Returns:
        The packages, each once, and the names that are not installed.
    """
    roots: dict[str, list[str]] = {
        name: _parts_of(name) if find_files(name) else _imports_of(name) for name in names
    }
    every = list(dict.fromkeys(root for paths in roots.values() for root in paths))
    outermost = [root for root in every if not any(root.startswith(f"{outer}.") for outer in every)]
    missing = [name for name, paths in roots.items() if not paths]
    return [Package(root, *_version_and_licence(root)) for root in outermost], missing


def find_files(root: str) -> dict[str, Files]:
    """The files of the modules at and below a dotted path; empty if there are none."""
    spec = _find_spec(top_level(root)) if all(map(str.isidentifier, root.split("."))) else None
    modules: dict[str, Files] = {}
    if spec is None:
        return modules
    if spec.submodule_search_locations is not None:
        for folder in spec.submodule_search_locations:
            for path, file in _walk(Path(folder), spec.name):
                _add_file(modules, path, file)
    elif spec.origin and spec.origin.endswith(".py"):
        source = Path(spec.origin)
        stub = source.with_suffix(".pyi")
        modules[spec.name] = Files(source, stub if stub.exists() else None)
    else:
        modules[spec.name] = Files(compiled=True)
    return {path: files for path, files in modules.items() if f"{path}.".startswith(f"{root}.")}


def have_same_owner(first: str, second: str) -> bool:
    """Whether two top-level packages come from one distribution, or both with Python."""
    if {first, second} <= sys.stdlib_module_names:
        return True
    return bool(set(_owners().get(first, ())) & set(_owners().get(second, ())))


def top_level(path: str) -> str:
    """The first component of a dotted path."""
    return path.partition(".")[0]


def _find_spec(name: str) -> ModuleSpec | None:
    """The import spec of a top-level module, without importing it."""
    # Frozen modules have source files, too, which only a search of the path finds.
    spec = None if name in sys.builtin_module_names else PathFinder.find_spec(name)
    with contextlib.suppress(ImportError, ValueError):
        return spec or importlib.util.find_spec(name)
    return None


def _walk(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    """Every file that may be a module, with its dotted path, in a fixed order."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name.isidentifier() and name != "__pycache__"
        )
        below = ".".join([package, *Path(here).relative_to(folder).parts])
        for file in sorted(files):
            stem = file.partition(".")[0]
            if stem.isidentifier():
                yield below if stem == "__init__" else f"{below}.{stem}", Path(here, file)


def _add_file(modules: dict[str, Files], path: str, file: Path) -> None:
    extension = "." + file.name.partition(".")[2]
    files = modules.get(path, Files())
    if extension == ".py":
        files.source = files.source or file
    elif extension == ".pyi":
        files.stub = files.stub or file
    elif extension in EXTENSION_SUFFIXES and not file.name.startswith("lib"):
        files.compiled = True  # lib*.so is a library that modules link to
    else:
        return
    modules[path] = files


def _imports_of(distribution: str) -> list[str]:
    """The public packages that a distribution installs."""
    wanted = _normalised(distribution)
    return sorted(
        name
        for name, owners in _owners().items()
        if not name.startswith("_") and wanted in map(_normalised, owners) and find_files(name)
    )


def _parts_of(root: str) -> list[str]:
    """The package, or its public parts if it is a namespace that distributions share."""
    modules = find_files(root)
    if root in modules:
        return [root]
    depth = root.count(".") + 2
    children = dict.fromkeys(".".join(path.split(".")[:depth]) for path in sorted(modules))
    public = [path for path in children if not path.rpartition(".")[2].startswith("_")]
    parts = [part for child in public for part in _parts_of(child)]
    shared = len({_owner_of(part) for part in parts}) > 1
    return parts if shared else [root]


def _version_and_licence(root: str) -> tuple[str, str]:
    owner = _owner_of(root)
    if owner is None and top_level(root) in sys.stdlib_module_names:
        return platform.python_version(), _PYTHON_LICENCE
    if owner is None:
        return "unknown", "not stated"
    distribution = metadata.distribution(owner)
    return distribution.version, _licence(distribution.metadata)


def _owner_of(root: str) -> str | None:
    """The distribution that installs a package; `None` if it is not known."""
    top = top_level(root)
    owners = sorted(set(_owners().get(top, ())), key=lambda name: (_normalised(name) != top, name))
    certain = [owner for owner in owners if _installs(owner, root)]
    if not certain and top in sys.stdlib_module_names:
        return None
    # An editable installation lists no files.
    return next(iter(certain or owners), None)


def _installs(owner: str, root: str) -> bool:
    """Whether a distribution lists files of a package; an editable installation does not."""
    folder = root.replace(".", "/")
    files = map(str, metadata.distribution(owner).files or ())
    return any(file.startswith((f"{folder}/", f"{folder}.")) for file in files)


def _licence(fields: Any) -> str:
    for field in ("License-Expression", "License"):
        text = str(fields.get(field) or "").strip()
        if 0 < len(text) <= _LONGEST_LICENCE and "\n" not in text:
            return text
    classifiers = map(str, fields.get_all("Classifier") or ())
    licences = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    return ", ".join(licences) or "not stated"


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """The distributions that install each top-level name."""
    return metadata.packages_distributions()


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
