"""Objects with another class for a while."""

from graft.runtime.overriding import overridden, override, variant

import pytest


class Greeter:
    def __call__(self) -> str:
        return "hello"


def louder(cls: type) -> type:
    return variant(cls, __call__=lambda self: cls.__call__(self).upper())


def test_one_object_changes_and_others_do_not() -> None:
    changed, other = Greeter(), Greeter()
    undo = override([changed], louder)
    assert (changed(), other()) == ("HELLO", "hello")
    assert isinstance(changed, Greeter) and type(changed).__name__ == "Greeter"
    undo()
    assert changed() == "hello" and type(changed) is Greeter


def test_an_error_ends_it_too() -> None:
    greeter = Greeter()
    with pytest.raises(ZeroDivisionError), overridden([greeter], louder):
        assert greeter() == "HELLO"
        raise ZeroDivisionError
    assert type(greeter) is Greeter


def test_further_bases_come_first() -> None:
    class Polite:
        def __call__(self) -> str:
            return "good day"

    assert variant(Greeter, Polite)()() == "good day"
