"""The registry of loaded adapters: names, ids, limits, and the number of requests that use each.

It is not thread-safe: callers hold a lock.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graft.engine.adapter_factors import BankFactors
from graft.engine.errors import (
    AdapterAlreadyLoaded,
    AdapterBusy,
    AdapterNotFound,
    TooManyAdapters,
)


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter.

    Attributes:
        id: the lowest free id at the time of loading; a replacement keeps it.
        name: the name by which requests choose it.
        path: the path it was read from.
        rank: highest rank of its layers.
        targets: paths of the layers that it adapts.
        bytes: memory that it takes.
        digest: hash of its content.
        requests: number of requests that use it, running or queued.
    """

    id: int
    name: str
    path: str
    rank: int
    targets: tuple[str, ...]
    bytes: int
    digest: str
    requests: int


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in the bank.

    Attributes:
        id: as in `AdapterInfo`, like `name`, `path` and `bytes`.
        factors: its factors, which identify it in the bank.
        requests: number of requests that use it.
        leaving: whether new requests are refused.
    """

    id: int
    name: str
    path: str
    factors: BankFactors
    bytes: int
    requests: int = 0
    leaving: bool = False

    def info(self) -> AdapterInfo:
        """A description for callers."""
        return AdapterInfo(
            self.id,
            self.name,
            self.path,
            self.factors.rank,
            tuple(sorted(self.factors.paths)),
            self.bytes,
            self.factors.digest,
            self.requests,
        )


class AdapterRegistry:
    """The adapters of an engine, by name.

    Args:
        limit: most adapters at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._adapters: dict[str, LoadedAdapter] = {}
        self._reserved: set[str] = set()
        self._replaced: dict[str, LoadedAdapter] = {}

    def infos(self) -> list[AdapterInfo]:
        """All adapters, ordered by id."""
        infos = [adapter.info() for adapter in self._adapters.values()]
        return sorted(infos, key=lambda info: info.id)

    def reserve(self, name: str, *, replace: bool) -> None:
        """Reserve a name for an adapter that is about to be loaded.

        Raises:
            AdapterAlreadyLoaded: an adapter of this name is loaded or being loaded.
            AdapterBusy: requests still use an adapter that was replaced before.
            TooManyAdapters: the limit is reached.
        """
        if name in self._reserved:
            raise AdapterAlreadyLoaded(f"adapter {name!r} is being loaded already")
        if name in self._adapters:
            if self._adapters[name].leaving:
                raise AdapterBusy(f"adapter {name!r} is being unloaded; try again later")
            if not replace:
                raise AdapterAlreadyLoaded(
                    f"adapter {name!r} is loaded already; replace it, or unload it first"
                )
            if self._replaced:
                names = ", ".join(map(repr, self._replaced))
                raise AdapterBusy(
                    f"requests still use the replaced version of {names}; "
                    f"replace {name!r} when they have ended"
                )
        elif len(self._adapters.keys() | self._reserved) >= self._limit:
            raise TooManyAdapters(
                f"{self._limit} adapters are loaded, the limit; unload one of {self._names()}, "
                "or start with a higher limit"
            )
        self._reserved.add(name)

    def unreserve(self, name: str) -> None:
        """Release a name that `reserve` took."""
        self._reserved.discard(name)

    def register(
        self, name: str, path: str, factors: BankFactors, nbytes: int
    ) -> tuple[AdapterInfo, LoadedAdapter | None]:
        """Register an adapter that is in the bank, so that requests can use it.

        Returns:
            Its description, and the adapter that it replaced, if no request uses that one.
        """
        replaced = self._adapters.get(name)
        used_ids = {adapter.id for adapter in self._adapters.values()}
        lowest = next(number for number in range(len(used_ids) + 1) if number not in used_ids)
        adapter = LoadedAdapter(replaced.id if replaced else lowest, name, path, factors, nbytes)
        self._adapters[name] = adapter
        if replaced is not None and replaced.requests:
            replaced.leaving = True
            self._replaced[name] = replaced
            return adapter.info(), None
        return adapter.info(), replaced

    def take(self, adapters: Mapping[str, float]) -> list[tuple[LoadedAdapter, float]]:
        """Take the adapters of a request, which stay loaded until `give_back`.

        Adapters of scale 0 must be loaded too, but are left out.

        Raises:
            AdapterNotFound: adapters are not loaded; all of them are named.
        """
        missing = [n for n in adapters if n not in self._adapters or self._adapters[n].leaving]
        if missing:
            raise AdapterNotFound(
                f"there is no adapter {', '.join(map(repr, missing))}; loaded: {self._names()}"
            )
        taken = [(self._adapters[name], float(scale)) for name, scale in adapters.items() if scale]
        for adapter, _ in taken:
            adapter.requests += 1
        return taken

    def give_back(self, adapters: Iterable[LoadedAdapter]) -> list[LoadedAdapter]:
        """Release a request's adapters; returns replaced ones that no request uses any more."""
        unused = []
        for adapter in adapters:
            adapter.requests -= 1
            if not adapter.requests and self._replaced.get(adapter.name) is adapter:
                del self._replaced[adapter.name]
                unused.append(adapter)
        return unused

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of a name.

        Raises:
            AdapterNotFound: it is not loaded.
        """
        if name not in self._adapters:
            raise AdapterNotFound(f"there is no adapter {name!r}; loaded: {self._names()}")
        return self._adapters[name]

    def leave(self, name: str) -> LoadedAdapter:
        """Refuse new requests for an adapter that is about to be unloaded.

        Raises:
            AdapterNotFound: it is not loaded.
            AdapterBusy: it is being replaced or unloaded already.
        """
        adapter = self.find(name)
        if adapter.leaving or name in self._reserved:
            change = "unloaded" if adapter.leaving else "replaced"
            raise AdapterBusy(f"adapter {name!r} is being {change} already")
        adapter.leaving = True
        return adapter

    def check_idle(self, adapter: LoadedAdapter) -> None:
        """Refuse to unload an adapter in use.

        Raises:
            AdapterBusy: requests use it.
        """
        if adapter.requests:
            raise AdapterBusy(
                f"adapter {adapter.name!r} is in use by {adapter.requests} requests; unload it "
                "when they have ended, or ask to wait for them"
            )

    def remove(self, adapter: LoadedAdapter) -> None:
        """Remove an adapter from the registry."""
        if self._adapters.get(adapter.name) is adapter:
            del self._adapters[adapter.name]

    def _names(self) -> str:
        return ", ".join(map(repr, self._adapters)) or "none"
