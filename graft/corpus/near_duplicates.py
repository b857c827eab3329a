"""Divides texts into train, valid and test so that nothing learned from one is measured in another.

Knows nothing of where the texts come from.
"""

import hashlib
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

DATASET_SPLITS = ("train", "valid", "test")

# The share of words, or of runs of three words, that makes two texts nearly equal.
NEARLY_EQUAL = 0.8
_FEWEST = 8  # shorter texts have words in common by chance; those must be equal word for word

_Part = tuple[str, ...] | tuple[str, int]


def group_near_duplicates(texts: Sequence[str], keys: Sequence[Hashable]) -> list[list[int]]:
    """Group the texts that belong together: equal keys, equal words, or nearly equal texts.

    Case, punctuation and spacing do not count. Two texts are nearly equal where they have 80 % of
    the longer one's words in common, in any order, or 80 % of the shorter one's runs of three
    words, so that the longer repeats the shorter. What belongs to one text belongs to its group.

    Returns:
        Indices of `texts`, ascending in each group; groups ascend by their first.
    """
    words = [tuple(re.findall(r"\w+", text.lower())) for text in texts]
    links = [*_equal(words), *_equal(keys)]
    links += _overlapping([_counted(one) for one in words], of=max)
    links += _overlapping([_runs(one) for one in words], of=min)
    return _connected(len(texts), links)


def assign_splits(
    grouped: Sequence[Sequence[int]], names: Sequence[str], *, fraction: float, seed: int
) -> dict[str, list[int]]:
    """Give each group to one split: `fraction` of the rows each to valid and test.

    Groups come in the order of a hash of the seed and their first name. One that does not fit into
    test goes to valid, and one that does not fit there goes to train. Groups above a tenth of a
    split come last, lest one thing said many times be a large part of what is measured. No split
    stays empty. The rows of a split are ordered by such a hash, too, so that its first rows are a
    fair sample.

    Args:
        grouped: at least three groups of row numbers.
        names: a name for each row, each once.
        fraction: share of all rows in valid, and in test.
        seed: another seed, another division.

    Returns:
        Row numbers by split.
    """

    def rank(row: int) -> str:
        return hashlib.sha256(f"{seed} {names[row]}".encode()).hexdigest()

    def order(group: Sequence[int]) -> tuple[bool, str]:
        return len(group) > max(1, room // 10), rank(min(group, key=names.__getitem__))

    room = max(1, round(fraction * len(names)))
    split: dict[str, list[Sequence[int]]] = {name: [] for name in DATASET_SPLITS}
    for group in sorted(grouped, key=order):
        fits = (name for name in ("test", "valid") if _rows(split[name]) + len(group) <= room)
        split[next(fits, "train")].append(group)
    for name in DATASET_SPLITS:
        if not split[name]:
            giver = max(split.values(), key=len)
            giver.remove(smallest := min(giver, key=len))
            split[name].append(smallest)
    return {
        name: sorted((row for group in those for row in group), key=rank)
        for name, those in split.items()
    }


def _rows(those: Iterable[Sequence[int]]) -> int:
    return sum(map(len, those))


def _counted(words: Sequence[str]) -> frozenset[_Part]:
    """The words, each with how many of its kind came before, so that sets count repetitions."""
    seen: Counter[str] = Counter()
    parts = []
    for word in words:
        parts.append((word, seen[word]))
        seen[word] += 1
    return frozenset(parts)


def _runs(words: Sequence[str]) -> frozenset[_Part]:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _equal(keys: Sequence[Hashable]) -> Iterable[tuple[int, int]]:
    first: dict[Hashable, int] = {}
    return [(first.setdefault(key, number), number) for number, key in enumerate(keys)]


def _overlapping(
    sets: Sequence[frozenset[_Part]], *, of: Callable[[int, int], int]
) -> Iterable[tuple[int, int]]:
    """The pairs of sets that share 80 % of the larger (`of=max`) or the smaller (`of=min`).

    Not all pairs need comparing: of n parts, at most n - 0.8 n are missing in a set that shares the
    rest, so any one part more tells which sets come into question. The rarest tell best.
    """
    frequency = Counter(part for one in sets for part in one)
    holders: defaultdict[_Part, list[int]] = defaultdict(list)
    for number, one in enumerate(sets):
        for part in one:
            holders[part].append(number)
    for number, one in enumerate(sets):
        if len(one) < _FEWEST:
            continue
        count = len(one) - math.ceil(NEARLY_EQUAL * len(one)) + 1
        rarest = heapq.nsmallest(count, one, key=frequency.__getitem__)
        for other in {other for part in rarest for other in holders[part]}:
            needed = NEARLY_EQUAL * of(len(one), len(sets[other]))
            if needed <= len(one) <= len(sets[other]) and len(one & sets[other]) >= needed:
                yield number, other


def _connected(count: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of a graph with `count` nodes (union-find)."""
    root = list(range(count))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for one, other in links:
        first, second = sorted((find(one), find(other)))
        root[second] = first
    found: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(count):
        found[find(node)].append(node)
    return list(found.values())
