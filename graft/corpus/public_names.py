"""Which objects a package documents, and the shortest public path of each.

Works on plain records of modules, whoever made them: source files (`graft.corpus.package_reading`)
or compiled modules (`graft.corpus.inspect_compiled`). Reads no file and imports no package.

A name is public when it has no leading underscore and is listed in its module's ``__all__``, or,
where there is none,

- is defined there,
- is imported in a package's ``__init__`` from the package itself, or
- is imported from one of the package's private modules (``from ._x import y``).

A submodule is public when its name has no leading underscore. What comes from outside the given
modules is never the package's own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

_NOTHING: frozenset[str] = frozenset()


@dataclass
class Name:
    """What a name in a module or a class is bound to.

    Attributes:
        kind: "class", "function", "property", "attribute" or "alias".
        doc: the docstring, "" where there is none.
        target: the dotted path an alias stands for; of an object in a compiled module, the path it
            gives for itself where that is another.
        members: the names bound in a class.
    """

    kind: str
    doc: str = ""
    target: str = ""
    members: "dict[str, Name]" = field(default_factory=dict)


@dataclass
class Module:
    """One module, as read.

    Attributes:
        path: the dotted path it is imported by.
        doc: its docstring, "" where there is none.
        is_package: whether it is a package's ``__init__``.
        exports: ``__all__``, None where there is none or it cannot be told; "*other" stands for all
            that the other module, named from here or in full, exports.
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
        path: that path.
        name: its end as one says it: ``function``, ``Class`` or ``Class.method``.
        kind: "module", "class", "function", "method", "property" or "attribute".
        doc: the docstring, "" where there is none.
    """

    path: str
    name: str
    kind: str
    doc: str


def merge_modules(first: Module, second: Module) -> None:
    """Fill what `first` lacks, names and docstrings, from a second description of the module."""
    first.doc = first.doc or second.doc
    first.is_package = first.is_package or second.is_package
    first.exports = second.exports if first.exports is None else first.exports
    first.wildcards += second.wildcards
    _merge_names(first.members, second.members)


def _merge_names(known: dict[str, Name], further: dict[str, Name]) -> None:
    for name, other in further.items():
        mine = known.setdefault(name, other)
        if mine is other or "alias" in (mine.kind, other.kind):
            continue
        if other.doc and not mine.doc:
            mine.doc, mine.kind = other.doc, other.kind
        _merge_names(mine.members, other.members)


def documented(members: dict[str, Name]) -> dict[str, Name]:
    """The definitions among `members` that carry a docstring, themselves or further in."""
    kept = {
        name: Name(item.kind, item.doc, members=documented(item.members))
        for name, item in members.items()
        if item.kind != "alias"
    }
    return {name: item for name, item in kept.items() if item.doc or item.members}


def public_objects(modules: Mapping[str, Module], root: str) -> list[PublicObject]:
    """Every public object below `root`, each once, under its shortest public path.

    The names are walked breadth first, so that the first path to reach an object has the fewest
    components; among equals the path where it is defined comes first, then one that ends in the
    name it is defined under, then the alphabet decides.

    Args:
        modules: the package's modules by dotted path, private ones included.
        root: the module to start from.
    """
    namespace = _Namespace(modules)
    seen: set[str] = set()
    taken: set[str] = set()
    objects: list[PublicObject] = []
    level = [(root, _Found(root, "", modules[root]))]
    while level:
        below: list[tuple[str, _Found]] = []
        for path, found in sorted(level, key=_canonical_first):
            if found.path not in seen and path not in taken:
                seen.add(found.path)
                taken.add(path)
                objects.append(_public_object(path, found))
                below += [(f"{path}.{name}", item) for name, item in namespace.below(found)]
        level = below
    return objects


@dataclass(frozen=True)
class _Found:
    """What a path leads to: the module it is defined in, its name there, and the definition."""

    module: str
    name: str
    item: Module | Name

    @property
    def path(self) -> str:
        """The defining path; a colon keeps a function apart from a module of the same path."""
        return f"{self.module}:{self.name}" if self.name else self.module


def _canonical_first(entry: tuple[str, _Found]) -> tuple[bool, bool, str, str]:
    """Orders paths with equally many components: as defined, then under the same name."""
    path, found = entry
    renamed = found.name != "" and path.rpartition(".")[2] != found.name.rpartition(".")[2]
    return path != found.path.replace(":", "."), renamed, path, found.path


def _public_object(path: str, found: _Found) -> PublicObject:
    depth = found.name.count(".") + 1
    name = ".".join(path.split(".")[-depth:])
    kind = "module" if isinstance(found.item, Module) else found.item.kind
    if kind == "function" and depth > 1:
        kind = "method"
    return PublicObject(path, name, kind, found.item.doc)


class _Namespace:
    """Looks names up across the modules of one package."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        self._named: dict[str, set[str]] = {}
        self._submodules: dict[str, list[str]] = {}
        for path in sorted(modules):
            self._submodules.setdefault(path.rpartition(".")[0], []).append(path)

    def below(self, found: _Found) -> Iterator[tuple[str, _Found]]:
        """The public names below a module or a class, and what they lead to."""
        if isinstance(found.item, Module):
            names = self._public_submodules(found.item) | self._public_names(found.item)
            yield from sorted(names.items())
        else:
            for name, item in sorted(found.item.members.items()):
                if _is_public(name) and item.kind != "alias":
                    yield name, _Found(found.module, f"{found.name}.{name}", item)

    def _public_submodules(self, module: Module) -> dict[str, _Found]:
        paths = {path.rpartition(".")[2]: path for path in self._submodules.get(module.path, ())}
        return {
            name: _Found(path, "", self._modules[path])
            for name, path in paths.items()
            if _is_public(name)
        }

    def _public_names(self, module: Module) -> dict[str, _Found]:
        found = {name: self._offered(module, name) for name in self._candidates(module)}
        return {name: item for name, item in found.items() if item}

    def _candidates(self, module: Module) -> set[str]:
        """The names that a module might offer: `__all__`, or all that are bound in it."""
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
        """`__all__`, with the names that it takes from other modules' `__all__`."""
        if module.exports is None:
            return None
        names = {name for name in module.exports if not name.startswith("*")}
        for entry in set(module.exports) - names:
            other = self._module_named(module, entry[1:])
            if other and other.path not in seen:
                names |= self._exports(other, seen | {other.path}) or set()
        return names

    def _module_named(self, module: Module, name: str) -> Module | None:
        """The module that a dotted name means within `module`: imported, below it, or in full."""
        first, dot, rest = name.partition(".")
        bound = module.members.get(first)
        imported = bound.target + dot + rest if bound else ""
        paths = (imported, f"{module.path}.{name}", name)
        return next((self._modules[path] for path in paths if path in self._modules), None)

    def _offered(self, module: Module, name: str, seen: frozenset[str] = _NOTHING) -> _Found | None:
        """What a name leads to if the module offers it to others, rather than using it."""
        if not _is_public(name) or name not in self._candidates(module):
            return None
        found = self._lookup(module, name, seen)
        bound = module.members.get(name)
        if module.exports is not None or found is None or bound is None:
            return found
        return found if _is_offered(module, bound, found) else None

    def _lookup(self, module: Module, name: str, seen: frozenset[str]) -> _Found | None:
        """What a module's name leads to, among the package's own modules."""
        item = module.members.get(name)
        if item is None:
            return self._from_wildcards(module, name, seen, self._offered)
        here = None if item.kind == "alias" else _Found(module.path, name, item)
        return (self._resolve(item.target, seen) if item.target else None) or here

    def _from_wildcards(
        self, module: Module, name: str, seen: frozenset[str], search: "_Search"
    ) -> _Found | None:
        for path in reversed(module.wildcards):  # the last import wins
            step = f"{path}.* {name}"
            if path in self._modules and step not in seen:
                found = search(self._modules[path], name, seen | {step})
                if found:
                    return found
        return None

    def _resolve(self, path: str, seen: frozenset[str]) -> _Found | None:
        """What an imported path leads to; None where that is outside the package or a circle."""
        if path in seen:
            return None
        parent, _, name = path.rpartition(".")
        found = None
        if parent in self._modules:
            module, seen = self._modules[parent], seen | {path}
            found = self._lookup(module, name, seen)
            if found is None and path not in self._modules and name not in module.members:
                # Whoever imports the name finds it, so an `__all__` was extended as the code ran.
                found = self._from_wildcards(module, name, seen, self._lookup)
        if found is None and path in self._modules:
            found = _Found(path, "", self._modules[path])
        return found


_Search = Callable[[Module, str, frozenset[str]], _Found | None]


def _is_offered(module: Module, bound: Name, found: _Found) -> bool:
    """Whether a module without `__all__` offers what a name of its own leads to."""
    if bound.kind != "alias":
        return found.module == module.path
    own_top, top = (path.partition(".")[0].lstrip("_") for path in (module.path, bound.target))
    if own_top != top:
        return False
    from_private = not all(map(_is_public, bound.target.split(".")))
    return module.is_package or (from_private and not isinstance(found.item, Module))


def _is_public(name: str) -> bool:
    return not name.startswith("_")
