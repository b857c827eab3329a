"""Finds the public objects of a package and the shortest public path of each.

Works on plain records of modules, made from source files (`graft.corpus.package_reading`) or from
compiled modules (`graft.corpus.inspect_compiled`). Reads no file and imports no package.

A name is public if it has no leading underscore and is listed in its module's ``__all__``, or, if
the module has no ``__all__``,

- is defined in the module,
- is imported in a package's ``__init__`` from the package itself, or
- is imported from one of the package's private modules (``from ._x import y``).

A submodule is public if its name has no leading underscore. An object from outside the given
modules never counts as part of the package.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

_NOTHING: frozenset[str] = frozenset()


@dataclass
class Name:
    """The object that a name in a module or a class is bound to.

    Attributes:
        kind: "class", "function", "property", "attribute" or "alias".
        doc: the docstring, or "".
        target: the dotted path that an alias stands for; for an object in a compiled module, the
            path that the object reports, if it is a different one.
        members: the names bound in a class.
    """

    kind: str
    doc: str = ""
    target: str = ""
    members: "dict[str, Name]" = field(default_factory=dict)


@dataclass
class Module:
    """One module.

    Attributes:
        path: the dotted path it is imported by.
        doc: the docstring, or "".
        is_package: whether it is a package's ``__init__``.
        exports: ``__all__``; None if there is none or it is computed. "*other" stands for all
            exports of another module, by its relative or full name.
        members: the names bound in it.
        wildcards: the modules of its ``from x import *``.
    """

    path: str
    doc: str = ""
    is_package: bool = False
    exports: list[str] | None = None
    members: dict[str, Name] = field(default_factory=dict)
    wildcards: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PublicObject:
    """A public object under its shortest public path.

    Attributes:
        path: the shortest public path.
        name: the end of the path: ``function``, ``Class`` or ``Class.method``.
        kind: "module", "class", "function", "method", "property" or "attribute".
        doc: the docstring, or "".
    """

    path: str
    name: str
    kind: str
    doc: str


def merge_modules(first: Module, second: Module) -> None:
    """Add names and docstrings that `first` lacks from a second description of the module."""
    first.doc = first.doc or second.doc
    first.is_package = first.is_package or second.is_package
    first.exports = second.exports if first.exports is None else first.exports
    first.wildcards += second.wildcards
    _merge_names(first.members, second.members)


def _merge_names(known: dict[str, Name], further: dict[str, Name]) -> None:
    for name, other in further.items():
        member = known.setdefault(name, other)
        if member is other or "alias" in (member.kind, other.kind):
            continue
        if other.doc and not member.doc:
            member.doc, member.kind = other.doc, other.kind
        _merge_names(member.members, other.members)


def documented(members: dict[str, Name]) -> dict[str, Name]:
    """The definitions among `members` that have a docstring or a member with one."""
    kept = {
        name: Name(item.kind, item.doc, members=documented(item.members))
        for name, item in members.items()
        if item.kind != "alias"
    }
    return {name: item for name, item in kept.items() if item.doc or item.members}


def public_objects(modules: Mapping[str, Module], root: str) -> list[PublicObject]:
    """Every public object below `root`, each once, under its shortest public path.

    The search is breadth-first, so the first path that reaches an object has the fewest
    components. Among paths of equal length, the defining path is preferred, then a path that ends
    in the name of the definition, then the alphabetically first.

    Args:
        modules: the package's modules by dotted path, private ones included.
        root: the module to start from.
    """
    namespace = _Namespace(modules)
    seen: set[str] = set()
    taken: set[str] = set()
    objects: list[PublicObject] = []
    level = [(root, _Definition(root, "", modules[root]))]
    while level:
        below: list[tuple[str, _Definition]] = []
        for path, definition in sorted(level, key=_canonical_first):
            if definition.path not in seen and path not in taken:
                seen.add(definition.path)
                taken.add(path)
                objects.append(_public_object(path, definition))
                below += [(f"{path}.{name}", item) for name, item in namespace.below(definition)]
        level = below
    return objects


@dataclass(frozen=True)
class _Definition:
    """The target of a path: the module that defines it, its name there, and the definition."""

    module: str
    name: str
    item: Module | Name

    @property
    def path(self) -> str:
        """The defining path; the colon distinguishes a function from a module of the same path."""
        return f"{self.module}:{self.name}" if self.name else self.module


def _canonical_first(entry: tuple[str, _Definition]) -> tuple[bool, bool, str, str]:
    """Sort key of paths of equal length: the defining path first, then the defined name."""
    path, definition = entry
    renamed = (
        definition.name != "" and path.rpartition(".")[2] != definition.name.rpartition(".")[2]
    )
    return path != definition.path.replace(":", "."), renamed, path, definition.path


def _public_object(path: str, definition: _Definition) -> PublicObject:
    depth = definition.name.count(".") + 1
    name = ".".join(path.split(".")[-depth:])
    kind = "module" if isinstance(definition.item, Module) else definition.item.kind
    if kind == "function" and depth > 1:
        kind = "method"
    return PublicObject(path, name, kind, definition.item.doc)


class _Namespace:
    """Resolves names across the modules of one package."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        self._named: dict[str, set[str]] = {}
        self._submodules: dict[str, list[str]] = {}
        for path in sorted(modules):
            self._submodules.setdefault(path.rpartition(".")[0], []).append(path)

    def below(self, definition: _Definition) -> Iterator[tuple[str, _Definition]]:
        """The public names below a module or a class, with their targets."""
        if isinstance(definition.item, Module):
            names = self._public_submodules(definition.item) | self._public_names(definition.item)
            yield from sorted(names.items())
        else:
            for name, item in sorted(definition.item.members.items()):
                if _is_public(name) and item.kind != "alias":
                    yield name, _Definition(definition.module, f"{definition.name}.{name}", item)

    def _public_submodules(self, module: Module) -> dict[str, _Definition]:
        paths = {path.rpartition(".")[2]: path for path in self._submodules.get(module.path, ())}
        return {
            name: _Definition(path, "", self._modules[path])
            for name, path in paths.items()
            if _is_public(name)
        }

    def _public_names(self, module: Module) -> dict[str, _Definition]:
        offered = {name: self._offered(module, name) for name in self._candidates(module)}
        return {name: definition for name, definition in offered.items() if definition}

    def _candidates(self, module: Module) -> set[str]:
        """The names that a module may offer: `__all__`, or all names bound in it."""
        if module.path not in self._named:
            self._named[module.path] = self._gather_candidates(module, set())
        return self._named[module.path]

    def _gather_candidates(self, module: Module, seen: set[str]) -> set[str]:
        seen.add(module.path)
        names = self._exports(module)
        if names is None:
            names = set(module.members)
            for path in module.wildcards:
                if path in self._modules and path not in seen:
                    names |= self._gather_candidates(self._modules[path], seen)
        return names

    def _exports(self, module: Module, seen: frozenset[str] = _NOTHING) -> set[str] | None:
        """`__all__`, including the names taken from the `__all__` of other modules."""
        if module.exports is None:
            return None
        names = {name for name in module.exports if not name.startswith("*")}
        for entry in set(module.exports) - names:
            other = self._module_named(module, entry[1:])
            if other and other.path not in seen:
                names |= self._exports(other, seen | {other.path}) or set()
        return names

    def _module_named(self, module: Module, name: str) -> Module | None:
        """The module that a dotted name refers to in `module`: imported, below it, or absolute."""
        first, dot, rest = name.partition(".")
        bound = module.members.get(first)
        imported = bound.target + dot + rest if bound else ""
        paths = (imported, f"{module.path}.{name}", name)
        return next((self._modules[path] for path in paths if path in self._modules), None)

    def _offered(
        self, module: Module, name: str, seen: frozenset[str] = _NOTHING
    ) -> _Definition | None:
        """The target of a name if the module offers it to others rather than only using it."""
        if not _is_public(name) or name not in self._candidates(module):
            return None
        definition = self._lookup(module, name, seen)
        bound = module.members.get(name)
        if module.exports is not None or definition is None or bound is None:
            return definition
        return definition if _is_offered(module, bound, definition) else None

    def _lookup(self, module: Module, name: str, seen: frozenset[str]) -> _Definition | None:
        """The target of a name in a module, if it is in the package."""
        item = module.members.get(name)
        if item is None:
            return self._from_wildcards(module, name, seen, self._offered)
        here = None if item.kind == "alias" else _Definition(module.path, name, item)
        return (self._resolve(item.target, seen) if item.target else None) or here

    def _from_wildcards(
        self, module: Module, name: str, seen: frozenset[str], search: "_Search"
    ) -> _Definition | None:
        for path in reversed(module.wildcards):  # the last import wins
            step = f"{path}.* {name}"
            if path in self._modules and step not in seen:
                definition = search(self._modules[path], name, seen | {step})
                if definition:
                    return definition
        return None

    def _resolve(self, path: str, seen: frozenset[str]) -> _Definition | None:
        """The target of an imported path; None if it is outside the package or circular."""
        if path in seen:
            return None
        parent, _, name = path.rpartition(".")
        definition = None
        if parent in self._modules:
            module, seen = self._modules[parent], seen | {path}
            definition = self._lookup(module, name, seen)
            if definition is None and path not in self._modules and name not in module.members:
                # The import works, so an `__all__` must have been extended when the code ran.
                definition = self._from_wildcards(module, name, seen, self._lookup)
        if definition is None and path in self._modules:
            definition = _Definition(path, "", self._modules[path])
        return definition


_Search = Callable[[Module, str, frozenset[str]], _Definition | None]


def _is_offered(module: Module, bound: Name, definition: _Definition) -> bool:
    """Whether a module without `__all__` offers the target of one of its names."""
    if bound.kind != "alias":
        return definition.module == module.path
    own_top, top = (path.partition(".")[0].lstrip("_") for path in (module.path, bound.target))
    if own_top != top:
        return False
    from_private = not all(map(_is_public, bound.target.split(".")))
    return module.is_package or (from_private and not isinstance(definition.item, Module))


def _is_public(name: str) -> bool:
    return not name.startswith("_")
