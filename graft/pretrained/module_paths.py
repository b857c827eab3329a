"""Paths of modules and tensors: sorts them naturally and abbreviates lists of them."""

import re
from collections.abc import Iterable


def natural_key(path: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def collapsed(paths: Iterable[str]) -> list[str]:
    """Paths that differ only in numbers as one pattern each, with a star and their count."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", path), []).append(path)
    return [
        f"{pattern} ({len(group)})" if len(group) > 1 else group[0]
        for pattern, group in groups.items()
    ]
