import itertools
import json
from dataclasses import replace
from typing import Any

import graft  # noqa: F401
from graft.data.batches import (
    MOST_WIDTHS,
    ROUNDING_SHARE,
    TrainingBatches,
    choose_widths,
    group_rows,
    pack_rows,
    sample_rows,
)
from graft.data.collate import Batch, collate, collate_packed
from graft.data.examples import Example

import numpy as np
import pytest

from support.paths import ROOT


def make_example(length: int, start: int = 0) -> Example:
    loss_mask = np.ones(length, dtype=np.bool_)
    loss_mask[:1] = False
    return Example(np.arange(start, start + length, dtype=np.int32), loss_mask)


def make_rows(count: int, *, longest: int = 300, seed: int = 0) -> list[Example]:
    lengths = np.random.default_rng(seed).integers(2, longest, count)
    return [make_example(int(length), 1000 * row) for row, length in enumerate(lengths)]


def epochs(
    examples: list[Example], batch_size: int, number: int, seed: int = 0
) -> list[list[Batch]]:
    """The batches of the first epochs."""
    steps = TrainingBatches(examples, batch_size, seed=seed)
    return [
        [batch for _ in range(steps.steps_per_epoch) for batch in next(steps)]
        for _ in range(number)
    ]


def iterate_batches(examples: list[Example], batch_size: int) -> list[Batch]:
    """The batches of an evaluation."""
    return [collate(examples, rows) for rows in group_rows(examples, batch_size)]


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows]


def padded_lengths(examples: list[Example]) -> np.ndarray:
    """What each row is padded to."""
    lengths = np.array([max(len(example) - 1, 1) for example in examples])
    widths = choose_widths(lengths)
    return widths[np.searchsorted(widths, lengths)]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17, 64])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_every_row_comes_exactly_once_an_epoch(count: int, batch_size: int) -> None:
    for batches in epochs(make_rows(count), batch_size, 3):
        assert sorted(rows_of(batches)) == list(range(count))
        assert len(batches) == -(-count // batch_size)
        assert all(len(batch.rows) <= batch_size for batch in batches)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_an_evaluation_takes_every_row_once_and_ends(batch_size: int) -> None:
    batches = list(iterate_batches(make_rows(17), batch_size))
    assert sorted(rows_of(batches)) == list(range(17))


def test_the_partial_batch_is_kept_not_filled_up() -> None:
    batches = list(iterate_batches(make_rows(10), 4))
    assert sorted(len(batch.rows) for batch in batches) == [2, 4, 4]
    assert sorted(batch["inputs"].shape[0] for batch in batches) == [2, 4, 4]


def test_each_epoch_has_another_order_and_another_company() -> None:
    first, second = epochs(make_rows(40), 4, 2)
    assert rows_of(first) != rows_of(second)
    assert {frozenset(b.rows) for b in first} != {frozenset(b.rows) for b in second}


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    examples = make_rows(40)
    once, again, other = (epochs(examples, 4, 3, seed) for seed in (5, 5, 6))
    assert [rows_of(batches) for batches in once] == [rows_of(batches) for batches in again]
    assert all(rows_of(a) != rows_of(b) for a, b in zip(once, other, strict=True))


def test_the_order_does_not_depend_on_the_global_randomness() -> None:
    examples = make_rows(40)
    np.random.seed(1)
    once = epochs(examples, 4, 1)
    np.random.seed(2)
    assert rows_of(once[0]) == rows_of(epochs(examples, 4, 1)[0])


def test_batches_do_not_come_sorted_by_length() -> None:
    (batches,) = epochs(make_rows(200), 4, 1)
    widths = [batch["inputs"].shape[1] for batch in batches]
    assert widths != sorted(widths)
    assert abs(np.corrcoef(widths, range(len(widths)))[0, 1]) < 0.4


def test_targets_are_inputs_moved_on_by_one() -> None:
    examples = make_rows(13)
    for batch in iterate_batches(examples, 4):
        for place, row in enumerate(batch.rows):
            tokens, length = examples[row].tokens, len(examples[row])
            assert batch["inputs"][place, : length - 1].tolist() == tokens[:-1].tolist()
            assert batch["targets"][place, : length - 1].tolist() == tokens[1:].tolist()
        assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all()


def test_padding_and_the_first_token_are_not_trained() -> None:
    examples = make_rows(13)
    for batch in iterate_batches(examples, 4):
        for place, row in enumerate(batch.rows):
            length = len(examples[row])
            assert batch["loss_mask"][place, : length - 1].all()
            assert not batch["loss_mask"][place, length - 1 :].any()
            assert not batch["targets"][place, length - 1 :].any()


def test_the_trained_tokens_are_all_tokens_but_the_first_of_each_row() -> None:
    examples = make_rows(50)
    total = sum(int(batch["loss_mask"].sum()) for batch in iterate_batches(examples, 4))
    assert total == sum(len(example) - 1 for example in examples)


def test_what_is_not_trained_in_a_row_is_not_trained_in_a_batch() -> None:
    tokens = np.arange(6, dtype=np.int32)
    masked = Example(tokens, np.array([False, False, False, True, True, True]))
    batch = collate([masked], [0], 6)
    assert batch["loss_mask"][0].tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(("length", "width"), [(1, 1), (2, 1), (33, 32), (34, 33)])
def test_a_batch_is_as_wide_as_what_its_longest_row_predicts(length: int, width: int) -> None:
    # A row of n tokens has n - 1 inputs that something follows.
    batch = collate([make_example(length), make_example(1)], [0, 1])
    assert batch["inputs"].shape == batch["targets"].shape == batch["loss_mask"].shape == (2, width)
    assert (batch["inputs"].dtype, batch["loss_mask"].dtype) == (np.int32, np.bool_)
    assert collate([make_example(length)], [0], 50)["inputs"].shape == (1, 50)


def test_a_row_of_one_token_trains_nothing() -> None:
    assert not collate([make_example(1)], [0])["loss_mask"].any()


def test_widths_are_few() -> None:
    widths = {b["inputs"].shape[1] for batches in epochs(make_rows(500), 4, 3) for b in batches}
    assert len(widths) <= MOST_WIDTHS


def test_every_row_fits_its_width_and_some_row_fills_it() -> None:
    lengths = np.array([len(example) - 1 for example in make_rows(300)])
    widths = padded_lengths(make_rows(300))
    assert (widths >= lengths).all()
    assert set(widths) <= set(lengths)


def cheapest(lengths: list[int], number: int) -> int:
    """The least sum over all choices of `number` widths, each tried."""
    values, counts = np.unique(lengths, return_counts=True)
    rows_up_to = np.cumsum(counts)
    last = len(values) - 1
    choices = np.array(list(itertools.combinations(range(last), number - 1)), dtype=np.int64)
    choices = np.concatenate([choices, np.full((len(choices), 1), last)], axis=1)
    rows = np.diff(rows_up_to[choices], axis=1, prepend=0)
    return int((values[choices] * rows).sum(axis=1).min())


@pytest.mark.parametrize("seed", range(6))
def test_the_widths_are_the_fewest_that_pad_little_and_the_best_of_that_number(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(10, 40, 25).tolist()
    widths = padded_lengths([make_example(length + 1) for length in lengths])
    number, allowed = len(set(widths)), sum(lengths) / (1 - ROUNDING_SHARE)
    assert widths.sum() == cheapest(lengths, number) <= allowed
    assert cheapest(lengths, number - 1) > allowed


def test_rows_of_one_length_have_one_width_and_no_padding() -> None:
    assert set(padded_lengths([make_example(40)] * 9)) == {39}
    assert TrainingBatches([make_example(40)] * 9, 2).padding_share == 0


def test_very_long_rows_are_rounded_before_widths_are_chosen() -> None:
    lengths = np.random.default_rng(0).integers(2, 100_000, 3000)
    widths = padded_lengths([Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths])
    assert (widths >= lengths - 1).all()
    assert 1 - (lengths - 1).sum() / widths.sum() < 1.2 * ROUNDING_SHARE


@pytest.mark.parametrize("batch_size", [4, 8])
def test_little_is_padding(batch_size: int) -> None:
    examples = make_rows(400, longest=500)
    unsorted = [
        collate(examples, range(start, start + batch_size))
        for start in range(0, len(examples), batch_size)
    ]
    real = sum(len(example) - 1 for example in examples)
    assert 1 - real / sum(batch["inputs"].size for batch in unsorted) > 0.35
    assert TrainingBatches(examples, batch_size).padding_share < 0.05


@pytest.mark.parametrize("workers", [1, 2])
def test_at_most_5_percent_of_the_included_dataset_is_padding(workers: int) -> None:
    rows = (ROOT / "datasets" / "mlx-docs" / "train.jsonl").read_text().splitlines()
    # Three letters a token, about what the included tokenizer gives.
    examples = [make_example(min(len(json.loads(row)["text"]) // 3 + 2, 512)) for row in rows]
    batches = TrainingBatches(examples, 4, workers=workers)
    for epoch in range(3):
        batches.restore({"epoch": epoch, "position": 0})
        assert batches.padding_share <= 0.05


def test_workers_divide_the_same_batches() -> None:
    examples = make_rows(18)
    whole, divided = (TrainingBatches(examples, 4, workers=workers) for workers in (1, 2))
    for _ in range(whole.steps_per_epoch):
        batches = next(divided)
        assert rows_of(next(whole)) == rows_of(batches)
        assert max(len(batch.rows) for batch in batches) == 2


def test_short_rows_come_first_in_an_evaluation() -> None:
    examples = make_rows(30)
    lengths = [len(examples[row]) for group in group_rows(examples, 4) for row in group]
    assert lengths == sorted(lengths)


def test_a_sample_is_the_same_every_time_and_another_for_another_seed() -> None:
    examples = make_rows(100)
    once, again, other = (sample_rows(examples, 10, seed=seed) for seed in (1, 1, 2))
    assert len(once) == 10
    assert [id(e) for e in once] == [id(e) for e in again]
    assert [id(e) for e in once] != [id(e) for e in other]


def test_a_sample_takes_no_row_twice_and_all_where_there_are_fewer() -> None:
    examples = make_rows(20)
    assert len({id(example) for example in sample_rows(examples, 19, seed=0)}) == 19
    assert sample_rows(examples, 20, seed=0) is examples
    assert sample_rows(examples, 100, seed=0) is examples


def test_a_sample_spans_all_lengths() -> None:
    examples = [make_example(length) for length in range(2, 402)]
    lengths = [len(example) for example in sample_rows(examples, 40, seed=0)]
    assert min(lengths) < 60 and max(lengths) > 340


@pytest.mark.parametrize("steps_taken", [0, 3, 7, 11])
def test_an_iterator_that_is_put_back_goes_on_the_same(steps_taken: int) -> None:
    examples = make_rows(17)
    first = TrainingBatches(examples, 2, accumulation=2, seed=4)
    for _ in range(steps_taken):
        next(first)
    second = TrainingBatches(examples, 2, accumulation=2, seed=4)
    second.restore(first.state())
    for _ in range(8):
        assert rows_of(next(first)) == rows_of(next(second))


def test_smaller_micro_batches_take_the_same_rows_a_step() -> None:
    examples = make_rows(17)
    whole, divided = (TrainingBatches(examples, size, accumulation=8 // size) for size in (8, 2))
    for _ in range(6):
        batches = next(divided)
        assert rows_of(next(whole)) == rows_of(batches)
        assert max(len(batch.rows) for batch in batches) <= 2


def test_the_most_at_one_time_is_a_micro_batch_in_each_lane() -> None:
    # Batches of 3 + 3 rows: all widths are 32 but one row's, of 64.
    examples = [make_example(33)] * 5 + [make_example(65)]

    def widest(size: int, **how: int) -> list[tuple[int, ...]]:
        return sorted(b["inputs"].shape for b in TrainingBatches(examples, size, **how).widest())

    assert widest(6) == [(6, 64)]
    assert widest(6, workers=2) == [(3, 32), (3, 64)]
    assert widest(3, accumulation=2) == [(3, 64)]
    assert widest(2, accumulation=3, workers=2) == [(1, 32), (1, 64)]


def test_the_padding_share_counts_what_is_computed_and_not_real() -> None:
    # Rows of 33 and 17 tokens give 32 and 16 inputs, 32 columns each: 48 of 64 are real.
    batches = TrainingBatches([make_example(33), make_example(17)], 2)
    assert batches.padding_share == pytest.approx(0.25)


def packed(examples: list[Example], capacity: int = 300, **settings: Any) -> TrainingBatches:
    return TrainingBatches(examples, 4, capacity=capacity, **settings)


def one_epoch(batches: TrainingBatches, epoch: int) -> list[Batch]:
    batches.restore({"epoch": epoch, "position": 0})
    return [batch for _ in range(batches.steps_per_epoch) for batch in next(batches)]


def pairs(batches: list[Batch]) -> set[frozenset[int]]:
    """Which rows stand in a packed row together."""
    found = set()
    for batch in batches:
        assert batch["segment_ids"] is not None
        rows = list(batch.rows)
        for segment_ids, loss_mask in zip(batch["segment_ids"], batch["loss_mask"], strict=True):
            there = [rows.pop(0) for _ in np.unique(segment_ids[loss_mask])]
            found |= {frozenset(pair) for pair in itertools.combinations(there, 2)}
        assert not rows
    return found


def test_filling_by_hand() -> None:
    """The longest first, each where it leaves the least room: 7 + 3, 6 + 4, 5 + 5."""

    class NoChance:
        def uniform(self, low: float, high: float, size: int) -> np.ndarray:
            return np.ones(size)

    lengths = np.array([3, 7, 5, 4, 6, 5])
    packs = pack_rows(lengths, 10, NoChance())  # type: ignore[arg-type]
    assert [[int(lengths[row]) for row in rows] for rows in packs] == [[7, 3], [6, 4], [5, 5]]


@pytest.mark.parametrize("count", [1, 2, 17, 300])
@pytest.mark.parametrize("capacity", [1, 299, 512, 2048])
@pytest.mark.parametrize("workers", [1, 2])
def test_packed_every_row_comes_exactly_once_an_epoch(
    count: int, capacity: int, workers: int
) -> None:
    """A capacity below the longest row is that of the longest row."""
    examples = make_rows(count)
    batches = packed(examples, capacity, workers=workers)
    for epoch in range(3):
        found = one_epoch(batches, epoch)
        assert sorted(rows_of(found)) == list(range(count))
        longest = max(len(example) - 1 for example in examples)
        assert max(batch["targets"].shape[1] for batch in found) <= max(capacity, longest)


def test_a_packed_row_holds_its_documents_one_after_the_other() -> None:
    examples = make_rows(5, longest=20)
    examples[3] = Example(examples[3].tokens, examples[3].loss_mask & False)
    batch = collate_packed(examples, [[2, 0, 3], [1], [4]], 70)
    assert batch.rows == (2, 0, 3, 1, 4)
    assert batch["segment_ids"] is not None
    for place, rows in enumerate([[2, 0, 3], [1], [4]]):
        start = 0
        for number, row in enumerate(rows, 1):
            example, end = examples[row], start + len(examples[row]) - 1
            assert batch["inputs"][place, start:end].tolist() == example.tokens[:-1].tolist()
            assert batch["targets"][place, start:end].tolist() == example.tokens[1:].tolist()
            assert batch["loss_mask"][place, start:end].tolist() == example.loss_mask[1:].tolist()
            assert set(batch["segment_ids"][place, start:end].tolist()) == {number}
            start = end
        assert not batch["loss_mask"][place, start:].any()
        assert set(batch["segment_ids"][place, start:].tolist()) == {len(rows) + 1}


def test_packed_states_stand_where_their_tokens_would() -> None:
    examples = [
        replace(e, states=np.full((len(e) - 1, 2), n + 1.0, dtype=np.float32))
        for n, e in enumerate(make_rows(3, longest=9))
    ]
    batch = collate_packed(examples, [[1, 0], [2]], 20)
    first, second = len(examples[1]) - 1, len(examples[0]) - 1
    assert batch["inputs"].shape == (2, 20, 2)
    values = [2.0] * first + [1.0] * second + [0.0] * (20 - first - second)
    assert batch["inputs"][0, :, 0].tolist() == values


def test_each_epoch_packs_other_rows_together_by_seed_and_epoch_alone() -> None:
    examples = make_rows(200)
    first, second = (pairs(one_epoch(packed(examples), epoch)) for epoch in (0, 1))
    assert len(first) > 50
    assert len(first & second) < len(first) / 2
    assert pairs(one_epoch(packed(examples), 1)) == second
    assert pairs(one_epoch(packed(examples, seed=1), 1)) != second


@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_at_most_5_percent_of_a_packed_epoch_is_padding_and_widths_are_few(capacity: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.6, 0.9, 600).astype(int).clip(2, 512)
    batches = packed([make_example(int(length)) for length in lengths], capacity)
    widths = set()
    for epoch in range(4):
        batches.restore({"epoch": epoch, "position": 0})
        assert batches.padding_share <= 0.05
        widths |= {tokens for _, tokens in batches.shapes()}
    assert len(widths) <= 3


def test_rows_that_do_not_go_together_are_padded_as_alone() -> None:
    """None fits beside another; the capacity itself is no width then."""
    examples = [make_example(n) for n in range(301, 401)]
    alone, batches = TrainingBatches(examples, 4), packed(examples, 512)
    assert batches.pack_count == 100
    assert batches.padding_share == pytest.approx(alone.padding_share, abs=0.02)


def test_a_small_dataset_is_not_padded_to_the_capacity() -> None:
    batches = packed([make_example(11)] * 3, 2048)
    assert batches.shapes() == [(1, 30)]
    assert batches.padding_share == 0


def test_packed_batches_that_are_put_back_go_on_the_same() -> None:
    first, second = packed(make_rows(60), seed=3), packed(make_rows(60), seed=3)
    for _ in range(first.steps_per_epoch + 2):
        next(first)
    second.restore(first.state())
    for _ in range(8):
        for one, other in zip(next(first), next(second), strict=True):
            assert one.rows == other.rows
            assert (one["inputs"] == other["inputs"]).all() and (
                one["segment_ids"] == other["segment_ids"]
            ).all()


@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2.25, 3])
def test_steps_of_epochs_end_where_every_row_was_seen_so_often(
    capacity: int | None, epochs: float
) -> None:
    batches = TrainingBatches(make_rows(53), 4, capacity=capacity)
    steps, rows = batches.steps_in(epochs), []
    for _ in range(steps):
        rows += rows_of(next(batches))
    assert batches.state()["epoch"] == max(int(np.ceil(epochs)) - 1, 0)
    assert len(rows) == pytest.approx(53 * epochs, abs=30)
    if epochs == int(epochs):
        assert sorted(rows) == sorted([*range(53)] * int(epochs))


def test_a_later_epoch_may_be_packed_fuller_than_the_first() -> None:
    """Seven rows, whose fullest pack has 35 tokens at first and 38 in the next epoch."""
    lengths = [21, 10, 7, 10, 13, 21, 14]
    examples = [make_example(length + 1) for length in lengths]
    batches = packed(examples, 40)
    fullest = []
    for epoch in (0, 1):
        found = one_epoch(batches, epoch)
        assert sorted(rows_of(found)) == list(range(7))
        fullest.append(max(int(row.sum()) for batch in found for row in batch["loss_mask"]))
    assert fullest == [35, 38]
