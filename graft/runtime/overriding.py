"""Overriding: changes the class of single objects, so that one instance behaves differently.

Python looks special methods such as `__call__` up on the class and not on the instance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def variant(cls: type, *bases: type, **members: Any) -> type:
    """A subclass of the same name with some members replaced.

    Args:
        cls: the class to derive from.
        bases: further base classes; their members come first.
        members: methods and attributes by name.
    """
    return type(cls.__name__, (*bases, cls), {"__module__": cls.__module__, **members})


def override(objects: Sequence[Any], make: Callable[[Any], type]) -> Callable[[], None]:
    """Give each object the class that `make` derives from its own.

    Returns:
        A function that gives the objects their classes back.
    """
    classes = [type(item) for item in objects]
    for item, cls in zip(objects, classes, strict=True):
        item.__class__ = make(cls)

    def undo() -> None:
        for item, cls in zip(objects, classes, strict=True):
            item.__class__ = cls

    return undo


@contextmanager
def overridden(objects: Sequence[Any], make: Callable[[Any], type]) -> Iterator[None]:
    """Like `override`, until the context ends."""
    undo = override(objects, make)
    try:
        yield
    finally:
        undo()
