"""Reads the docstrings of a package.

Python sources and stubs are parsed with griffe, never executed; compiled modules are imported in
child processes (`graft.corpus.inspect_compiled`). Knows nothing about what the docstrings are for.
"""

import ast
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.console import one_line
from graft.corpus.inspect_compiled import inspect_modules
from graft.corpus.packages import Files, Package, find_files, have_same_owner, top_level
from graft.corpus.public_names import (
    Module,
    Name,
    PublicObject,
    documented,
    merge_modules,
    public_objects,
)
from graft.runtime.interrupts import Interrupts

import griffe

_FILES_WORTH_PROCESSES = 200  # fewer files are read before processes have started
_TEST_MODULE = re.compile(r"tests|test_\w*|conftest")

ReadingProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Documentation:
    """The documentation of a package.

    Attributes:
        package: the package.
        modules: the number of modules read.
        objects: the public objects, each once.
        skipped: from what was not read to the reason.
    """

    package: Package
    modules: int
    objects: list[PublicObject]
    skipped: dict[str, str]


def read_package(
    package: Package, *, workers: int, report: ReadingProgress = lambda done, total: None
) -> Documentation:
    """Read the documentation of a package.

    Args:
        package: the package, from `find_packages`.
        workers: the number of processes that read files at the same time.
        report: called repeatedly with the number of modules read and the number known.
    """
    reading = _Reading(workers, report)
    roots = [package.root]
    while roots:
        reading.parse(roots)
        roots = reading.private_siblings(package.name)
    reading.inspect()
    count = len(reading.modules)
    _add_parents(reading.modules, package.root)
    objects = public_objects(reading.modules, package.root)
    return Documentation(package, count, objects, reading.skipped)


class _Reading:
    """A package that is being read.

    Attributes:
        modules: the modules read so far, by dotted path.
        skipped: from what was not read to the reason.
    """

    def __init__(self, workers: int, report: ReadingProgress) -> None:
        self.modules: dict[str, Module] = {}
        self.skipped: dict[str, str] = {}
        self._files: dict[str, Files] = {}
        self._roots: set[str] = set()
        self._workers = workers
        self._report = report
        self._done = 0
        self._total = 0

    def parse(self, roots: Iterable[str]) -> None:
        """Parse the sources and stubs of packages."""
        modules: dict[str, Files] = {}
        for root in roots:
            self._roots.add(root)
            modules |= self._without_tests(root, find_files(root))
        self._files |= modules
        readable = {path: files for path, files in modules.items() if files.source or files.stub}
        self._total += len(readable)
        for path, module, problems in _parse_all(readable, self._workers):
            if module:
                self.modules[path] = module
            self.skipped |= problems
            self._step()

    def _without_tests(self, root: str, files: dict[str, Files]) -> dict[str, Files]:
        kept = {
            path: module_files
            for path, module_files in files.items()
            if not any(map(_TEST_MODULE.fullmatch, path.split(".")[1:]))
        }
        if len(kept) < len(files):
            count = len(files) - len(kept)
            self.skipped[f"{root}: test modules ({count})"] = "they document tests"
        return kept

    def _step(self) -> None:
        self._done += 1
        self._report(self._done, self._total)

    def private_siblings(self, name: str) -> list[str]:
        """Private top-level packages that the modules import and that have the same owner.

        `collections` keeps its classes in `_collections`, `pytest` in `_pytest`.
        """
        tops = {top_level(path) for path in self._imported()}
        private = {top for top in tops if top.startswith("_") and not top.startswith("__")}
        return sorted(top for top in private - self._roots if have_same_owner(name, top))

    def _imported(self) -> Iterator[str]:
        for module in self.modules.values():
            yield from module.wildcards
            yield from (item.target for item in module.members.values() if item.target)

    def inspect(self) -> None:
        """Describe the compiled modules that are public or imported by other modules."""
        used = {prefix for path in self._imported() for prefix in _prefixes(path)}
        names = [
            path
            for path, files in sorted(self._files.items())
            if files.compiled and not files.source and (path in used or _is_public(path))
        ]
        self._total += len(names)
        described, failed = inspect_modules(
            names, workers=self._workers, report=lambda name: self._step()
        )
        self.skipped |= failed
        for fields in described:
            module = _module_from_fields(fields)
            if module.path in self.modules:
                merge_modules(self.modules[module.path], module)
            else:
                self.modules[module.path] = module


def _add_parents(modules: dict[str, Module], root: str) -> None:
    """Add modules for the folders of namespace packages, which have no file."""
    modules.setdefault(root, Module(root, is_package=True))
    for path in list(modules):
        for prefix in _prefixes(path):
            modules.setdefault(prefix, Module(prefix, is_package=True))


def _module_from_fields(fields: Mapping[str, Any]) -> Module:
    return Module(**{**fields, "members": _names_from_fields(fields["members"])})


def _names_from_fields(members: Mapping[str, Any]) -> dict[str, Name]:
    return {
        name: Name(**{**fields, "members": _names_from_fields(fields["members"])})
        for name, fields in members.items()
    }


def _parse_all(
    modules: Mapping[str, Files], workers: int
) -> Iterator[tuple[str, Module | None, dict[str, str]]]:
    """Parse sources and stubs, in several processes if there are many."""
    jobs = list(modules.items())
    if workers == 1 or len(jobs) < _FILES_WORTH_PROCESSES:
        yield from map(_parse_files, jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking is unsafe with the threads of a BLAS
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        with Interrupts() as interrupts, _inherited_by_workers():
            results = pool.map(_parse_files, jobs, chunksize=16)
        if interrupts.received:
            raise KeyboardInterrupt
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """Make worker processes ignore Ctrl-C, which their parent handles, and load no BLAS."""
    blas = os.environ.get("GRAFT_BLAS")
    os.environ["GRAFT_BLAS"] = "off"
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if blas is None:
            del os.environ["GRAFT_BLAS"]
        else:
            os.environ["GRAFT_BLAS"] = blas


def _parse_files(job: tuple[str, Files]) -> tuple[str, Module | None, dict[str, str]]:
    """One module from its source, its stub or both, and the problems with either.

    A stub beside a source adds only documented names: the source decides what a module binds.
    """
    path, files = job
    parsed: list[Module] = []
    problems = {}
    for file in filter(None, (files.source, files.stub)):
        try:
            module = _parse(path, file)
        except Exception as error:  # a problem with one file must not stop the others
            name = path if file.suffix == ".py" else f"{path} (stub)"
            problems[name] = f"it cannot be parsed: {_reason(error)}"
            continue
        if files.source and file == files.stub:
            module = Module(path, module.doc, members=documented(module.members))
        parsed.append(module)
    for further in parsed[1:]:
        merge_modules(parsed[0], further)
    return path, parsed[0] if parsed else None, problems


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    text = error.msg if isinstance(error, SyntaxError) else one_line(error)
    return f"{type(error).__name__}: {text[:200]}" + (f" (line {line})" if line else "")


def _parse(path: str, file: Path) -> Module:
    logging.getLogger("griffe").setLevel(logging.CRITICAL)  # hides unresolved annotations
    parent = None
    for part in path.split(".")[:-1]:  # relative imports are resolved through the parents
        parent = griffe.Module(part, filepath=file.with_name("__init__.py"), parent=parent)
    with tokenize.open(file) as text:
        code = text.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in foreign code
        parsed = griffe.visit(path.split(".")[-1], filepath=file, code=code, parent=parent)
        exports = _exports(parsed, code)
    aliases = [alias for alias in parsed.members.values() if isinstance(alias, griffe.Alias)]
    return Module(
        path,
        _doc(parsed),
        file.stem == "__init__",
        exports=exports,
        members=_names(parsed),
        wildcards=[alias.target_path for alias in aliases if alias.wildcard],
    )


def _names(parsed: griffe.Module | griffe.Class) -> dict[str, Name]:
    names: dict[str, Name] = {}
    for name, overloads in parsed.overloads.items():  # in stubs, which have no implementation
        names[name] = Name("function", next(filter(None, map(_doc, overloads)), ""))
    for name, member in parsed.members.items():
        if isinstance(member, griffe.Alias):
            if not member.wildcard and member.runtime:
                names[name] = Name("alias", target=member.target_path)
        elif isinstance(member, griffe.Class):
            names[name] = Name("class", _doc(member), members=_names(member))
        elif not isinstance(member, griffe.Module):
            names[name] = Name(_kind(member), _doc(member))
    return names


def _kind(member: griffe.Object) -> str:
    if "property" in member.labels:
        return "property"
    return "function" if member.is_function else "attribute"


def _doc(described: griffe.Object) -> str:
    return described.docstring.value.strip() if described.docstring else ""


def _exports(parsed: griffe.Module, code: str) -> list[str] | None:
    """`__all__`; `None` if there is none, or if parts of it are computed when the code runs."""
    bound = parsed.members.get("__all__")
    if isinstance(bound, griffe.Alias):  # from other import __all__
        return ["*" + bound.target_path.removesuffix(".__all__")]
    if bound is None:
        return None
    names: list[str] = []
    tree = ast.parse(code)
    try:
        loops = _loop_modules(tree)
        for node in ast.walk(tree):
            for name in _exported_by(node):
                names += loops.get(name, [name])
    except _NotLiteralError:
        return None
    return names


def _loop_modules(tree: ast.Module) -> dict[str, list[str]]:
    """What `*module` stands for in `for module in (a, b): __all__.extend(module.__all__)`.

    Raises:
        _NotLiteralError: such a loop is over something that has to be evaluated.
    """
    loops: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.For) and isinstance(node.target, ast.Name)):
            continue
        variable = f"*{node.target.id}"
        if any(variable in _exported_by(inner) for inner in ast.walk(node)):
            if not isinstance(node.iter, ast.List | ast.Tuple):
                raise _NotLiteralError
            modules = [f"*{ast.unparse(item)}" for item in node.iter.elts]
            loops[variable] = [*loops.get(variable, []), *modules]
    return loops


class _NotLiteralError(Exception):
    """An expression that has to be evaluated to know its value."""


def _exported_by(node: ast.AST) -> list[str]:
    """The names that one statement or call adds to `__all__`."""
    match node:
        case ast.Assign(targets=[ast.Name("__all__")], value=value):
            return _strings(value)
        case ast.AnnAssign(target=ast.Name("__all__"), value=ast.expr() as value):
            return _strings(value)
        case ast.AugAssign(target=ast.Name("__all__"), op=ast.Add(), value=value):
            return _strings(value)
        case ast.Call(func=ast.Attribute(value=ast.Name("__all__"), attr="extend"), args=[value]):
            return _strings(value)
        case ast.Call(func=ast.Attribute(value=ast.Name("__all__"), attr="append"), args=[value]):
            return _strings(ast.List([value]))
        case ast.Attribute(value=ast.Name("__all__"), attr="remove" | "insert"):
            raise _NotLiteralError
    return []


def _strings(value: ast.expr) -> list[str]:
    """The strings of a sequence expression; "*module" stands for another module's `__all__`.

    Raises:
        _NotLiteralError: the expression is not a literal sequence.
    """
    match value:
        case ast.List(items) | ast.Tuple(items) | ast.Set(items):
            return [text for item in items for text in _string(item)]
        case ast.BinOp(left, ast.Add(), right):
            return _strings(left) + _strings(right)
        case ast.Attribute(module, "__all__"):
            return ["*" + ast.unparse(module)]
        case ast.Call(ast.Attribute(copied, "copy"), []):
            return _strings(copied)
        case ast.Call(ast.Name("list" | "tuple" | "sorted"), [copied]):
            return _strings(copied)
    raise _NotLiteralError


def _string(item: ast.expr) -> list[str]:
    match item:
        case ast.Constant(str() as text):
            return [text]
        case ast.Starred(sequence):
            return _strings(sequence)
    raise _NotLiteralError


def _is_public(path: str) -> bool:
    return not any(part.startswith("_") for part in path.split("."))


def _prefixes(path: str) -> Iterator[str]:
    """Of `a.b.c`: `a`, `a.b` and `a.b.c`."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
