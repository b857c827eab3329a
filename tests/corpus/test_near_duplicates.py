"""graft/corpus/near_duplicates.py: nothing in one split gives away another."""

import itertools
import random
from collections import Counter

from graft.corpus.near_duplicates import NEARLY_EQUAL, assign_splits, group_near_duplicates

import pytest


def grouped(*texts: str) -> list[list[int]]:
    return group_near_duplicates(texts, range(len(texts)))


def test_equal_words_are_one_group_whatever_their_case_and_punctuation() -> None:
    assert grouped("See: ``abs``.", "Else.", "see  ABS") == [[0, 2], [1]]


def test_equal_keys_are_one_group() -> None:
    assert group_near_duplicates(["a", "b", "c"], ["relu", "tanh", "relu"]) == [[0, 2], [1]]


def test_a_text_within_another_is_one_group_with_it() -> None:
    # mlx.nn.relu and mlx.nn.ReLU
    function = "Applies the Rectified Linear Unit. Simply ``mx.maximum(x, 0)``."
    a_class = function + " See :func:`relu` for the functional equivalent."
    assert grouped(a_class, "Something else altogether.", function) == [[0, 2], [1]]


def test_texts_that_differ_in_one_word_of_many_are_one_group() -> None:
    # mlx.core.arcsin and mlx.core.arccos: 15 of 17 words
    sine = (
        "Element-wise inverse sine. Args: a (array): Input array. Returns: The inverse sine of a."
    )
    assert grouped(sine, "Something else.", sine.replace("sine", "cosine")) == [[0, 2], [1]]


def test_half_the_words_in_common_are_not_enough() -> None:
    one = "Element-wise square root. Args: a (array): Input array."
    assert grouped(one, "Element-wise maximum. Args: a (array): Input. Returns the largest.") == [
        [0],
        [1],
    ]


def test_short_texts_that_differ_in_a_word_stay_apart() -> None:
    assert grouped("See the function abs.", "See the function add.") == [[0], [1]]


def test_grouping_is_transitive() -> None:
    words = [f"w{number}" for number in range(30)]
    texts = [" ".join(words[start : start + 20]) for start in (0, 3, 6)]
    runs = [
        set(zip(text.split(), text.split()[1:], text.split()[2:], strict=False)) for text in texts
    ]
    assert len(runs[0] & runs[1]) / 18 >= NEARLY_EQUAL > len(runs[0] & runs[2]) / 18
    assert grouped(*texts) == [[0, 1, 2]]


def test_candidates_miss_no_pair_that_comparing_all_finds() -> None:
    generator = random.Random(0)
    texts = []
    for _ in range(60):
        words = [generator.choice("abcdefghijklm") for _ in range(generator.randint(7, 16))]
        swapped = [words[1], "n", *words[2:]]
        texts += [" ".join(each) for each in (words, [*words, "o"], words[1:], swapped)]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}

    def are_near(one: str, other: str) -> bool:
        shorter, longer = sorted((runs(one), runs(other)), key=len)
        repeated = len(shorter) >= 8 and len(shorter & longer) >= NEARLY_EQUAL * len(shorter)
        first, second = Counter(one.split()), Counter(other.split())
        longest = max(first.total(), second.total())
        common = min(first.total(), second.total()) >= 8 and (
            (first & second).total() >= NEARLY_EQUAL * longest
        )
        return repeated or common or one == other

    pairs = list(itertools.combinations(range(len(texts)), 2))
    near = [pair for pair in pairs if are_near(texts[pair[0]], texts[pair[1]])]
    assert len(near) > 100
    assert grouped(*texts) == connected(len(texts), near)


def connected(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Connected components, by spreading the smallest number until nothing changes."""
    label = list(range(count))
    while True:
        before = list(label)
        for one, other in pairs:
            label[one] = label[other] = min(label[one], label[other])
        if label == before:
            return [[n for n in range(count) if label[n] == first] for first in sorted(set(label))]


NAMES = [f"package.object{number}" for number in range(100)]
GROUPS = [[number] for number in range(60)] + [[n, n + 1] for n in range(60, 100, 2)]


def test_valid_and_test_get_their_share_and_train_the_rest() -> None:
    divided = assign_splits(GROUPS, NAMES, fraction=0.1, seed=42)
    assert {name: len(rows) for name, rows in divided.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    assert sorted(row for rows in divided.values() for row in rows) == list(range(100))


def test_a_group_is_never_divided() -> None:
    for seed in range(20):
        divided = assign_splits(GROUPS, NAMES, fraction=0.1, seed=seed)
        of_row = {row: name for name, rows in divided.items() for row in rows}
        assert all(len({of_row[row] for row in group}) == 1 for group in GROUPS)


def test_the_division_depends_on_names_and_seed_alone() -> None:
    divided = assign_splits(GROUPS, NAMES, fraction=0.1, seed=42)
    again = assign_splits([group[::-1] for group in GROUPS[::-1]], NAMES, fraction=0.1, seed=42)
    assert again == divided
    assert assign_splits(GROUPS, NAMES, fraction=0.1, seed=43) != divided


def test_a_large_group_goes_to_train() -> None:
    for seed in range(20):
        divided = assign_splits(
            [list(range(90)), *([n] for n in range(90, 100))], NAMES, fraction=0.05, seed=seed
        )
        assert set(range(90)) <= set(divided["train"])
        assert (len(divided["valid"]), len(divided["test"])) == (5, 5)


def test_a_group_that_would_be_much_of_a_split_goes_to_train_while_others_can_fill_it() -> None:
    small, large = [[number] for number in range(92)], [list(range(92, 100))]
    for seed in range(20):
        assert set(range(92, 100)) <= set(
            assign_splits(small + large, NAMES, fraction=0.1, seed=seed)["train"]
        )
    pairs = [[number, number + 1] for number in range(0, 100, 2)]
    divided = assign_splits(pairs, NAMES, fraction=0.1, seed=42)
    assert (len(divided["valid"]), len(divided["test"])) == (10, 10)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.499])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [3, 4, 5], [1, 20, 30], [1] * 10])
def test_no_split_is_empty(sizes: list[int], fraction: float) -> None:
    numbers = iter(range(100))
    few = [[next(numbers) for _ in range(size)] for size in sizes]
    divided = assign_splits(few, NAMES[: sum(sizes)], fraction=fraction, seed=42)
    assert all(divided.values())
    assert sorted(row for rows in divided.values() for row in rows) == list(range(sum(sizes)))
