"""Which adapters an engine has: their names, ids and limits, and how many requests need each.

Knows nothing of threads: whoever shares it between several holds a lock.
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
        id: the lowest that was free when it was loaded; a replacement keeps it.
        name: by which requests ask for it.
        path: where it was read from.
        rank: the largest of its layers.
        targets: paths of the layers that it adapts.
        bytes: what it takes in memory.
        digest: of its content.
        requests: that run or wait with it.
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
        id: as in `AdapterInfo`; so are the others.
        factors: by which the bank knows it.
        requests: that need it there.
        leaving: whether it takes no new requests.
    """

    id: int
    name: str
    path: str
    factors: BankFactors
    bytes: int
    requests: int = 0
    leaving: bool = False

    def info(self) -> AdapterInfo:
        """What is told of it."""
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
    """The adapters of an engine by name.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._adapters: dict[str, LoadedAdapter] = {}
        self._reserved: set[str] = set()
        self._replaced: dict[str, LoadedAdapter] = {}

    def infos(self) -> list[AdapterInfo]:
        """All adapters in the order of their ids."""
        return sorted((one.info() for one in self._adapters.values()), key=lambda info: info.id)

    def reserve(self, name: str, *, replace: bool) -> None:
        """Keep a place for an adapter that is about to be loaded.

        Raises:
            AdapterAlreadyLoaded: it is, or it is being loaded.
            AdapterBusy: requests still run with the one that was replaced the last time.
            TooManyAdapters: no place is left.
        """
        if name in self._reserved:
            raise AdapterAlreadyLoaded(f"adapter {name!r} is being loaded already")
        if name in self._adapters:
            if self._adapters[name].leaving:
                raise AdapterBusy(f"adapter {name!r} is being unloaded; load it after that")
            if not replace:
                raise AdapterAlreadyLoaded(
                    f"adapter {name!r} is loaded already; ask for it to be replaced, or unload it"
                )
            if self._replaced:
                raise AdapterBusy(
                    f"requests still run with what {', '.join(map(repr, self._replaced))} was "
                    f"before it was replaced; replace {name!r} when they have ended"
                )
        elif len(self._adapters.keys() | self._reserved) >= self._limit:
            raise TooManyAdapters(
                f"{self._limit} adapters are loaded, and no more may be; unload one of "
                f"{self._names()}, or start with a higher limit"
            )
        self._reserved.add(name)

    def unreserve(self, name: str) -> None:
        """Give the place up that `reserve` kept."""
        self._reserved.discard(name)

    def register(
        self, name: str, path: str, factors: BankFactors, nbytes: int
    ) -> tuple[AdapterInfo, LoadedAdapter | None]:
        """Let requests find an adapter that is in the bank now.

        Returns:
            What is told of it, and the one that it replaced, if nothing needs that any more.
        """
        before = self._adapters.get(name)
        used = {one.id for one in self._adapters.values()}
        lowest = next(number for number in range(len(used) + 1) if number not in used)
        new = LoadedAdapter(before.id if before else lowest, name, path, factors, nbytes)
        self._adapters[name] = new
        if before is not None and before.requests:
            before.leaving = True
            self._replaced[name] = before
            return new.info(), None
        return new.info(), before

    def take(self, adapters: Mapping[str, float]) -> list[tuple[LoadedAdapter, float]]:
        """The adapters of a request, which need not be unloaded until it gives them back.

        Those of scale 0 must be there too, and are left out.

        Raises:
            AdapterNotFound: naming all that are not there.
        """
        missing = [n for n in adapters if n not in self._adapters or self._adapters[n].leaving]
        if missing:
            raise AdapterNotFound(
                f"there is no adapter {', '.join(map(repr, missing))}; there are {self._names()}"
            )
        taken = [(self._adapters[name], float(scale)) for name, scale in adapters.items() if scale]
        for one, _ in taken:
            one.requests += 1
        return taken

    def give_back(self, adapters: Iterable[LoadedAdapter]) -> list[LoadedAdapter]:
        """End a request's use; returns the replaced ones that nothing needs any more."""
        unneeded = []
        for one in adapters:
            one.requests -= 1
            if not one.requests and self._replaced.get(one.name) is one:
                del self._replaced[one.name]
                unneeded.append(one)
        return unneeded

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of that name.

        Raises:
            AdapterNotFound: there is none.
        """
        if name not in self._adapters:
            raise AdapterNotFound(f"there is no adapter {name!r}; there are {self._names()}")
        return self._adapters[name]

    def leave(self, name: str) -> LoadedAdapter:
        """Keep new requests from an adapter that is to be unloaded.

        Raises:
            AdapterNotFound: there is none of that name.
            AdapterBusy: it is being replaced or unloaded already.
        """
        adapter = self.find(name)
        if adapter.leaving or name in self._reserved:
            doing = "unloaded" if adapter.leaving else "replaced"
            raise AdapterBusy(f"adapter {name!r} is being {doing} already")
        adapter.leaving = True
        return adapter

    def check_idle(self, adapter: LoadedAdapter) -> None:
        """Refuse to unload what is in use.

        Raises:
            AdapterBusy: telling by how many requests.
        """
        if adapter.requests:
            raise AdapterBusy(
                f"adapter {adapter.name!r} is in use by {adapter.requests} requests; unload it "
                "when they have ended, or ask to wait for them"
            )

    def remove(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter."""
        if self._adapters.get(adapter.name) is adapter:
            del self._adapters[adapter.name]

    def _names(self) -> str:
        return ", ".join(map(repr, self._adapters)) or "none loaded"
