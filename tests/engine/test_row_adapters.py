"""The adapters of rows go wherever mlx-lm's batches move the rows."""

import copy
from typing import Any

from graft.engine.adapter_bank import AdapterBank, ScaledAdapters
from graft.engine.adapter_factors import make_factors
from graft.engine.row_adapters import MultiAdapterModel, RowAdapters

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ChunkedKVCache

from support.served import logits_with, make_adapter
from support.tiny import LLAMA, make_model

A, B, C = ((("a", 1.0),), (("b", 0.5),), ())
ROWS: Any = [A, B, C]


def test_rows_are_merged_extended_filtered_and_taken_out() -> None:
    entry = RowAdapters.merge([RowAdapters([row]) for row in ROWS])
    assert entry.rows == ROWS
    entry.extend(RowAdapters([A, B]))
    entry.filter([4, 0, 2])
    assert entry.rows == [B, A, C]
    assert entry.extract(1).rows == [A]
    assert (entry.size(), entry.nbytes, entry.empty(), entry.trim(3)) == (0, 0, False, 3)


def test_a_copy_has_rows_of_its_own_and_the_same_adapters() -> None:
    adapter: Any = object()
    entry = RowAdapters([((adapter, 1.0),)])
    twin = copy.deepcopy(entry)
    twin.filter([])
    assert entry.rows[0][0][0] is adapter and twin.rows == []


def test_slots_are_made_anew_when_rows_or_bank_change() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="q_proj")
    bank = AdapterBank(model, max_adapters=2, max_rank=8)
    first, second = (make_factors(adapter, model, bank.modules, name="a") for _ in range(2))
    for factors in (first, second):
        list(bank.install(factors))
    entry = RowAdapters([((second, 1.0),), ()])

    def slots() -> list[int]:
        return entry.slots(bank)[0].slots.tolist()

    row_slots = entry.slots(bank)
    assert slots() == [2, 0] and entry.slots(bank) is row_slots
    list(bank.remove(first))
    assert slots() == [1, 0]
    entry.filter([1, 0, 0])
    assert slots() == [0, 1, 1]


def test_the_generator_moves_adapters_with_their_rows() -> None:
    """Prompts of other lengths and answers that end at other steps, so that rows split and move."""
    model = make_model(LLAMA)
    adapters = [None, *(make_adapter(model, seed=n, targets="all-linear") for n in range(3))]
    prompts = [[5 + n] * (1 + 4 * n) for n in range(4)]
    expected = [
        int(logits_with(model, mx.array([p]), a)[0, -1].argmax().item())
        for p, a in zip(prompts, adapters, strict=True)
    ]
    bank = AdapterBank(model, max_adapters=3, max_rank=8)
    rows: list[ScaledAdapters] = [()]
    for adapter in adapters[1:]:
        assert adapter is not None
        rows.append(((make_factors(adapter, model, bank.modules, name="a"), 1.0),))
        list(bank.install(rows[-1][0][0]))
    adapted: Any = MultiAdapterModel(model, bank)
    generator = BatchGenerator(adapted, prefill_batch_size=2, prefill_step_size=3)
    uids = generator.insert(prompts, [3, 9, 1, 5], caches=[adapted.make_cache(row) for row in rows])
    first: dict[int, int] = {}
    while len(first) < 4:
        for response in generator.next_generated():
            first.setdefault(response.uid, response.token)
    assert [first[uid] for uid in uids] == expected


def test_a_row_alone_keeps_the_caches_that_its_model_makes() -> None:
    model = make_model(LLAMA)
    model.make_cache = lambda: [ChunkedKVCache(8) for _ in model.layers]
    bank = AdapterBank(model, max_adapters=1, max_rank=1)
    adapted = MultiAdapterModel(model, bank, single_row=True)
    _, first, *_ = cache = adapted.make_cache()
    assert isinstance(first, ChunkedKVCache) and first.merge([first]) is first
    adapted(mx.array([[5, 6, 7]]), cache)
    twin = first.extract(0)
    first.filter([0])
    adapted(mx.array([[8]]), cache)
    assert (twin.offset, first.offset) == (3, 4)
    with pytest.raises(ValueError, match="too many values"):
        first.merge([first, twin])


def test_a_row_alone_is_not_cut_back_to_tokens_that_its_cache_gave_up() -> None:
    model = make_model(LLAMA)
    model.make_cache = lambda: [ChunkedKVCache(8) for _ in model.layers]
    bank = AdapterBank(model, max_adapters=1, max_rank=1)
    adapted = MultiAdapterModel(model, bank, single_row=True)
    _, first, *_ = cache = adapted.make_cache()
    adapted(mx.array([list(range(5, 25))]), cache)
    assert first.is_trimmable()
    first.maybe_trim_front()
    assert first.start_position > 0 and not first.is_trimmable()
