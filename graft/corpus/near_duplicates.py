"""Divides texts into train, valid and test so that near-duplicates share a split.

A test text that nearly equals a training text would measure memory, not generalization. Knows
nothing about where the texts come from.
"""

import hashlib
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

DATASET_SPLITS = ("train", "valid", "test")

# Texts that share this fraction of their words or three-word sequences are near-duplicates.
NEARLY_EQUAL = 0.8
_FEWEST = 8  # shorter texts share words by chance, so they must be equal word for word

_Part = tuple[str, ...] | tuple[str, int]


def group_near_duplicates(texts: Sequence[str], keys: Sequence[Hashable]) -> list[list[int]]:
    """Group texts that have equal keys, equal words, or nearly equal words.

    Case, punctuation and spacing are ignored. Two texts are nearly equal if they share 80% of the
    longer one's words, in any order, or 80% of the shorter one's three-word sequences, which means
    that the longer text repeats the shorter one. Groups are transitive.

    Returns:
        Indices of `texts`, ascending in each group; groups are sorted by their first index.
    """
    words = [tuple(re.findall(r"\w+", text.lower())) for text in texts]
    links = [*_equal(words), *_equal(keys)]
    links += _overlapping([_counted(sequence) for sequence in words], of=max)
    links += _overlapping([_trigrams(sequence) for sequence in words], of=min)
    return _connected(len(texts), links)


def assign_splits(
    grouped: Sequence[Sequence[int]], names: Sequence[str], *, fraction: float, seed: int
) -> dict[str, list[int]]:
    """Assign each group of rows to one split; valid and test get `fraction` of the rows each.

    Groups are assigned in the order of a hash of the seed and their first name. A group that does
    not fit into test goes to valid, and one that does not fit there goes to train. Groups larger
    than a tenth of a split are assigned last, so that no repeated text dominates an evaluation. No
    split is empty. The rows of a split are sorted by the same hash, so its first rows are a random
    sample.

    Args:
        grouped: at least three groups of row numbers.
        names: a unique name for each row.
        fraction: the fraction of all rows in valid, and in test.
        seed: the seed of the hash.

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
        name: sorted((row for group in groups for row in group), key=rank)
        for name, groups in split.items()
    }


def _rows(groups: Iterable[Sequence[int]]) -> int:
    return sum(map(len, groups))


def _counted(words: Sequence[str]) -> frozenset[_Part]:
    """The words, each numbered by its earlier occurrences, so that sets count repetitions."""
    seen: Counter[str] = Counter()
    parts = []
    for word in words:
        parts.append((word, seen[word]))
        seen[word] += 1
    return frozenset(parts)


def _trigrams(words: Sequence[str]) -> frozenset[_Part]:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _equal(keys: Sequence[Hashable]) -> Iterable[tuple[int, int]]:
    first: dict[Hashable, int] = {}
    return [(first.setdefault(key, number), number) for number, key in enumerate(keys)]


def _overlapping(
    sets: Sequence[frozenset[_Part]], *, of: Callable[[int, int], int]
) -> Iterable[tuple[int, int]]:
    """The pairs of sets that share 80% of the larger (`of=max`) or the smaller (`of=min`) one.

    Comparing all pairs is not needed. A set that shares 80% of n parts lacks at most 20% of them,
    so it contains at least one of any 0.2 n + 1 of them. Looking up the sets that contain one of
    the rarest 0.2 n + 1 parts finds few candidates.
    """
    frequency = Counter(part for parts in sets for part in parts)
    holders: defaultdict[_Part, list[int]] = defaultdict(list)
    for number, parts in enumerate(sets):
        for part in parts:
            holders[part].append(number)
    for number, parts in enumerate(sets):
        if len(parts) < _FEWEST:
            continue
        count = len(parts) - math.ceil(NEARLY_EQUAL * len(parts)) + 1
        rarest = heapq.nsmallest(count, parts, key=frequency.__getitem__)
        for candidate in {holder for part in rarest for holder in holders[part]}:
            size = len(sets[candidate])
            needed = NEARLY_EQUAL * of(len(parts), size)
            if needed <= len(parts) <= size and len(parts & sets[candidate]) >= needed:
                yield number, candidate


def _connected(count: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of a graph with `count` nodes (union-find)."""
    root = list(range(count))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for link in links:
        first, second = sorted(map(find, link))
        root[second] = first
    components: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(count):
        components[find(node)].append(node)
    return list(components.values())
