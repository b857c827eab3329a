"""Names, ids and limits of adapters, and who needs them."""

from graft.engine.adapter_factors import BankFactors
from graft.engine.errors import (
    AdapterAlreadyLoaded,
    AdapterBusy,
    AdapterNotFound,
    TooManyAdapters,
)
from graft.engine.registry import AdapterInfo, AdapterRegistry, LoadedAdapter

import pytest


def load(
    registry: AdapterRegistry, name: str, *, replace: bool = False, digest: str = "d"
) -> tuple[AdapterInfo, LoadedAdapter | None]:
    registry.reserve(name, replace=replace)
    factors = BankFactors({}, frozenset({"layers.1", "layers.0"}), 8, 4, digest)
    found = registry.register(name, f"/{name}", factors, 100)
    registry.unreserve(name)
    return found


def names(registry: AdapterRegistry) -> list[str]:
    return [info.name for info in registry.infos()]


def test_an_adapter_tells_what_it_is() -> None:
    registry = AdapterRegistry(2)
    info, replaced = load(registry, "a")
    targets = ("layers.0", "layers.1")
    assert info == AdapterInfo(0, "a", "/a", 4, targets, 100, "d", 0) and replaced is None
    registry.take({"a": 1.0})
    assert registry.infos()[0].requests == 1


def test_ids_are_the_lowest_that_are_free() -> None:
    registry = AdapterRegistry(4)
    for name in "abc":
        load(registry, name)
    registry.remove(registry.leave("b"))
    assert load(registry, "d")[0].id == 1
    assert load(registry, "e")[0].id == 3
    assert names(registry) == ["a", "d", "c", "e"]


def test_no_more_than_the_limit_those_being_loaded_counted() -> None:
    registry = AdapterRegistry(2)
    load(registry, "a")
    registry.reserve("b", replace=False)
    with pytest.raises(TooManyAdapters, match=r"2 adapters are loaded.*unload one of 'a'"):
        registry.reserve("c", replace=False)
    registry.unreserve("b")
    registry.reserve("c", replace=False)


def test_a_name_is_loaded_once_unless_it_is_to_be_replaced() -> None:
    registry = AdapterRegistry(1)
    load(registry, "a")
    with pytest.raises(AdapterAlreadyLoaded, match="'a' is loaded already"):
        registry.reserve("a", replace=False)
    info, before = load(registry, "a", replace=True, digest="new")
    assert (info.id, info.digest, before is not None) == (0, "new", True)
    registry.reserve("a", replace=True)
    with pytest.raises(AdapterAlreadyLoaded, match="'a' is being loaded"):
        registry.reserve("a", replace=True)


def test_all_missing_names_are_told_and_nothing_is_taken() -> None:
    registry = AdapterRegistry(2)
    load(registry, "a")
    with pytest.raises(AdapterNotFound, match="no adapter 'x', 'y'; loaded: 'a'"):
        registry.take({"x": 1.0, "a": 1.0, "y": 0.0})
    assert registry.infos()[0].requests == 0


def test_scale_0_is_not_taken() -> None:
    registry = AdapterRegistry(2)
    load(registry, "a")
    load(registry, "b")
    taken = registry.take({"a": 0.0, "b": -1})
    assert [(one.name, scale) for one, scale in taken] == [("b", -1.0)]


def test_what_is_in_use_stays() -> None:
    registry = AdapterRegistry(2)
    load(registry, "a")
    taken = [one for one, _ in registry.take({"a": 1.0})]
    leaving = registry.leave("a")
    with pytest.raises(AdapterBusy, match="'a' is in use by 1 requests"):
        registry.check_idle(leaving)
    with pytest.raises(AdapterNotFound):
        registry.take({"a": 1.0})
    for again in (lambda: registry.leave("a"), lambda: registry.reserve("a", replace=True)):
        with pytest.raises(AdapterBusy, match="'a' is being unloaded"):
            again()
    assert registry.give_back(taken) == []
    registry.check_idle(leaving)


def test_what_was_replaced_goes_with_its_last_request() -> None:
    registry = AdapterRegistry(1)
    load(registry, "a")
    first, second = ([one for one, _ in registry.take({"a": 1.0})] for _ in range(2))
    assert load(registry, "a", replace=True)[1] is None
    with pytest.raises(AdapterBusy, match="requests still use the replaced version of 'a'"):
        registry.reserve("a", replace=True)
    new = [one for one, _ in registry.take({"a": 1.0})]
    assert new[0] is not first[0]
    assert registry.give_back(first) == []
    assert registry.give_back(second) == second
    assert registry.give_back(new) == []
    registry.reserve("a", replace=True)


def test_an_unknown_name_is_not_found() -> None:
    with pytest.raises(AdapterNotFound, match="no adapter 'a'; loaded: none"):
        AdapterRegistry(1).find("a")
