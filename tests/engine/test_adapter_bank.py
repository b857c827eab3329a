"""Each row of a batch has the logits that it has alone, and adapters come and go without a trace.

Expected values are the model's own with the adapter attached in the plain way, row by row.
"""

import copy
import gc
from typing import Any

from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import FusedParts
from graft.engine.adapter_bank import AdapterBank, ScaledAdapters
from graft.engine.adapter_factors import BankFactors, make_factors
from graft.errors import RunError
from graft.runtime.cpu import suit_backend

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.architectures import read_configs
from support.fast_cases import ARCHITECTURES, SMALL
from support.served import PLANS, Adapter, logits_with, make_adapter
from support.tiny import LLAMA, QWEN2, make_model

TOKENS = mx.array(np.random.default_rng(0).integers(3, 500, (8, 7)))


def bank_of(model: nn.Module, **limits: int) -> AdapterBank:
    return AdapterBank(model, **{"max_adapters": 8, "max_rank": 64, **limits})


def install(bank: AdapterBank, adapter: Adapter) -> BankFactors:
    factors = make_factors(adapter, bank.model, bank.modules, name="a")
    for _ in bank.install(factors):
        pass
    return factors


def remove(bank: AdapterBank, factors: BankFactors) -> None:
    for _ in bank.remove(factors):
        pass


def mixed(
    bank: AdapterBank, rows: list[ScaledAdapters], tokens: mx.array | None = None
) -> mx.array:
    tokens = TOKENS[: len(rows)] if tokens is None else tokens
    with bank.applied(bank.row_slots(rows), len(rows)):
        logits = bank.model(tokens)
    mx.eval(logits)
    return logits


def largest_difference(first: mx.array, second: mx.array) -> float:
    return mx.abs(first - second).max().item()


def active_memory() -> int:
    gc.collect()
    return mx.get_active_memory()


def model_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in tree_flatten(model.parameters())}


def quantized() -> nn.Module:
    model = make_model(LLAMA)
    nn.quantize(model, group_size=32, bits=4)
    suit_backend(model)
    return model


# Rows


@pytest.mark.parametrize("make", [lambda: make_model(LLAMA), quantized], ids=["whole", "quantized"])
def test_each_row_of_a_mixed_batch_has_its_solo_logits(make: Any) -> None:
    model = make()
    adapters = [make_adapter(model, seed=n, **plan) for n, plan in enumerate(PLANS.values())]
    base = logits_with(model, TOKENS, None)
    expected = [base, *(logits_with(model, TOKENS, adapter) for adapter in adapters)]
    bank = bank_of(model)
    rows: list[ScaledAdapters] = [(), *(((install(bank, a), 1.0),) for a in adapters)]
    logits = mixed(bank, rows)
    for number, solo in enumerate(expected):
        assert largest_difference(logits[number], solo[number]) < 1e-5
        assert number == 0 or largest_difference(solo[number], base[number]) > 1e-3


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mixtral"])
def test_rows_keep_apart_in_every_architecture(name: str) -> None:
    model = make_model({**SMALL, "model_type": name, **ARCHITECTURES[name]})
    adapters = [make_adapter(model, seed=n, targets="all-linear", rank=2 + 9 * n) for n in (0, 1)]
    expected = [logits_with(model, TOKENS[:3], adapter) for adapter in (*adapters, None)]
    bank = bank_of(model)
    logits = mixed(bank, [((install(bank, adapter), 1.0),) for adapter in adapters] + [()])
    for number, solo in enumerate(expected):
        size = max(1.0, mx.abs(solo).max().item())
        assert largest_difference(logits[number], solo[number]) < 1e-5 * size


FEED_FORWARDS = {
    "mixtral": ("gate_proj", "down_proj"),
    "olmoe": ("gate_proj", "down_proj"),
    "phixtral": ("fc1", "fc2"),
}


# 10 tokens are few enough to stay in their order, and 120 are sorted by expert. olmoe
# flattens the rows of a batch into one axis, and phixtral's experts have two layers.
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_experts_know_the_row_of_a_token_in_any_order(name: str, bits: int | None) -> None:
    model = make_model(read_configs()[name])
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        suit_backend(model)
    first, last = FEED_FORWARDS[name]
    plans = [("all-linear", 2), (first, 11), ("all-linear", 4), (last, 11)]
    adapters = [
        make_adapter(model, seed=n, targets=targets, rank=rank)
        for n, (targets, rank) in enumerate(plans)
    ]
    lengths = 2, 24
    tokens = {n: mx.array(np.random.default_rng(0).integers(3, 500, (5, n))) for n in lengths}
    expected = {
        length: [
            logits_with(model, tokens[length][n : n + 1], adapter, n - 0.5)[0]
            for n, adapter in enumerate((None, *adapters))
        ]
        for length in lengths
    }
    bank = bank_of(model)
    factors = [install(bank, adapter) for adapter in adapters]
    rows: list[ScaledAdapters] = [(), *(((each, 0.5 + n),) for n, each in enumerate(factors))]
    for length in lengths:
        logits = mixed(bank, rows, tokens[length])
        for number, solo in enumerate(expected[length]):
            size = max(1.0, mx.abs(solo).max().item())
            assert largest_difference(logits[number], solo) < 2e-5 * size
            assert number == 0 or largest_difference(logits[number], logits[0]) > 1e-3
    for each in factors:
        remove(bank, each)
    assert not any("Banked" in repr(module) for module in model.modules())


@pytest.mark.parametrize("kind", [None, "embedding-input"])
@pytest.mark.parametrize("bits", [None, 4])
def test_an_embedding_is_adapted_with_the_output_tied_to_it(kind: str | None, bits: int) -> None:
    """Or without it, as PEFT has it, also where another row's adapter adapts both."""
    model = make_model(QWEN2)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        suit_backend(model)
    both = make_adapter(model, targets="embed_tokens,q_proj", rank=3, seed=1)
    adapter = make_adapter(model, targets="embed_tokens", rank=5, seed=2)
    path = "model.embed_tokens"
    adapter.layers[path] = LayerConfig(5, 16.0, kind=kind)
    adapters = [both, adapter]
    expected = [logits_with(model, TOKENS[:3], adapter) for adapter in (*adapters, None)]
    bank = bank_of(model)
    logits = mixed(bank, [((install(bank, adapter), 1.0),) for adapter in adapters] + [()])
    for number, solo in enumerate(expected):
        assert largest_difference(logits[number], solo[number]) < 1e-5


def test_parts_of_a_fused_projection_are_adapted_alone() -> None:
    model = make_model({**LLAMA, "model_type": "phi3"})
    adapter = make_adapter(model, targets="qkv_proj.q,qkv_proj.v,gate_up_proj.up", rank=3)
    path = "model.layers.0.self_attn.qkv_proj"
    assert adapter.layers[path].parts == FusedParts(("q", "k", "v"), (64, 32, 32), ("q", "v"))
    expected = logits_with(model, TOKENS[:2], adapter)
    bank = bank_of(model)
    logits = mixed(bank, [((install(bank, adapter), 1.0),), ()])
    assert largest_difference(logits[0], expected[0]) < 1e-5


# Scales and sums


def test_rows_without_adapters_are_the_base_bit_for_bit() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="all-linear")
    expected = logits_with(model, TOKENS[:3], None)
    bank = bank_of(model)
    factors = install(bank, adapter)
    assert mx.array_equal(mixed(bank, [(), (), ()]), expected)
    beside = mixed(bank, [(), ((factors, 1.0),), ((factors, 0.0),)])
    assert mx.array_equal(beside[0], expected[0]) and mx.array_equal(beside[2], expected[2])
    assert not mx.array_equal(beside[1], expected[1])


@pytest.mark.parametrize("scale", [-1.0, -0.25, 0.5, 3.0])
def test_a_scale_multiplies_the_update(scale: float) -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="all-linear")
    expected = logits_with(model, TOKENS[:2], adapter, scale)
    plain = logits_with(model, TOKENS[:2], adapter)
    bank = bank_of(model)
    factors = install(bank, adapter)
    logits = mixed(bank, [((factors, scale),), ((factors, 1.0),)])
    assert largest_difference(logits[0], expected[0]) < 1e-5
    assert largest_difference(logits[1], plain[1]) < 1e-5


def test_several_adapters_in_a_row_are_the_sum_of_their_changes() -> None:
    """Against the base with W + sum of scale_j (A_j B_j)^T in place of W."""
    model = make_model(LLAMA)
    adapters = [
        make_adapter(model, seed=1, targets="all-linear", rank=4),
        make_adapter(model, seed=2, targets="q_proj,up_proj", rank=6),
        make_adapter(model, seed=3, targets="v_proj,up_proj", rank=20),
    ]
    scales = [1.0, -0.5, 2.0]
    summed = copy.deepcopy(model)
    modules = dict(summed.named_modules())
    for adapter, scale in zip(adapters, scales, strict=True):
        for path, setting in adapter.layers.items():
            a, b = adapter.tensors[f"{path}.lora_a"], adapter.tensors[f"{path}.lora_b"]
            change = scale * setting.alpha / setting.rank * (a @ b).T
            modules[path].weight = modules[path].weight + change
    expected = logits_with(summed, TOKENS[:3], None)
    alone = logits_with(model, TOKENS[:3], adapters[1])
    bank = bank_of(model)
    factors = [install(bank, adapter) for adapter in adapters]
    three = tuple(zip(factors, scales, strict=True))
    logits = mixed(bank, [three, ((factors[1], 1.0),), three[::-1]])
    assert largest_difference(logits[0], expected[0]) < 1e-5
    assert largest_difference(logits[1], alone[1]) < 1e-5
    assert largest_difference(logits[2], expected[2]) < 1e-5


def test_numbers_that_overflow_stay_in_their_row() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="all-linear")
    expected = logits_with(model, TOKENS[:2], None)
    bank = bank_of(model)
    logits = mixed(bank, [(), ((install(bank, adapter), 1e38),)])
    assert mx.array_equal(logits[0], expected[0])
    assert not mx.isfinite(logits[1]).all()


# Coming and going


@pytest.mark.slow
def test_a_thousand_swaps_leave_the_base_s_bytes_and_arrays() -> None:
    model = make_model(LLAMA)
    adapters = [make_adapter(model, seed=n, **plan) for n, plan in enumerate(PLANS.values())]
    before, arrays = model_bytes(model), dict(tree_flatten(model.parameters()))
    bank = bank_of(model)
    held: list[BankFactors] = []
    generator = np.random.default_rng(0)
    for number in range(1000):
        adapter = adapters[number % len(adapters)]
        if len(held) == 4:
            remove(bank, held.pop(int(generator.integers(4))))
        held.append(install(bank, adapter))
    for factors in held:
        remove(bank, factors)
    after = dict(tree_flatten(model.parameters()))
    assert model_bytes(model) == before
    assert all(after[name] is array for name, array in arrays.items())
    assert bank.nbytes == 0


@pytest.mark.usefixtures("exact_memory")
def test_what_leaves_gives_its_memory_back() -> None:
    model = make_model(LLAMA)
    adapters = [make_adapter(model, seed=n, targets="all-linear", rank=16) for n in range(3)]
    bank = bank_of(model)
    empty = active_memory()
    factors = [install(bank, adapter) for adapter in adapters]
    one = bank.bytes_of(factors[0])
    assert bank.nbytes == 4 * one
    assert active_memory() == empty + 4 * one
    remove(bank, factors[0])
    remove(bank, factors[1])
    assert bank.nbytes == 2 * one
    assert active_memory() == empty + 2 * one
    remove(bank, factors[2])
    assert active_memory() == empty
    assert not any("Banked" in repr(module) for module in model.modules())


def test_rows_are_right_between_the_steps_of_a_change() -> None:
    model = make_model(LLAMA)
    adapters = [make_adapter(model, seed=n, targets="all-linear", rank=8) for n in range(4)]
    expected = [logits_with(model, TOKENS[:3], adapter) for adapter in adapters]
    bank = bank_of(model)
    factors = [install(bank, adapter) for adapter in adapters[:3]]
    new = make_factors(adapters[3], model, bank.modules, name="a")
    checks = 0
    # The first leaves: the last of the stack takes its place while rows run with it.
    for change, used in ((bank.remove(factors[0]), (1, 2)), (bank.install(new), (1, 2))):
        for _ in change:
            logits = mixed(bank, [((factors[n], 1.0),) for n in used] + [()])
            for row, number in enumerate(used):
                assert largest_difference(logits[row], expected[number][row]) < 1e-5
            checks += 1
    assert checks > 3 * 20
    logits = mixed(bank, [((new, 1.0),)])
    assert largest_difference(logits[0], expected[3][0]) < 1e-5


def test_an_adapter_that_cannot_be_installed_leaves_the_bank_as_it_was() -> None:
    model = make_model(LLAMA)
    adapters = [make_adapter(model, targets="all-linear", seed=n) for n in range(2)]
    bank = bank_of(model)
    first = install(bank, adapters[0])
    expected = mixed(bank, [((first, 1.0),), ()])
    held = bank.nbytes
    bad = make_factors(adapters[1], model, bank.modules, name="a")
    bad.layers["model.layers.2.mlp.up_proj"] = (np.zeros((3, 3), np.float32),) * 2
    with pytest.raises(ValueError, match="concatenate"):
        list(bank.install(bad))
    assert bank.nbytes == held
    assert mx.array_equal(mixed(bank, [((first, 1.0),), ()]), expected)


def test_clearing_gives_the_model_back() -> None:
    model = make_model(LLAMA)
    expected = logits_with(model, TOKENS, None)
    names = [name for name, _ in model.named_modules()]
    bank = bank_of(model)
    install(bank, make_adapter(model, targets="all-linear"))
    bank.clear()
    assert [name for name, _ in model.named_modules()] == names
    assert mx.array_equal(model(TOKENS), expected)


def test_the_limits_cost_at_most_what_is_said() -> None:
    """By hand: in + out numbers a rank in every layer; 2 slots more than there are adapters."""
    model = make_model(LLAMA)
    targets = "all-linear,embed_tokens,lm_head"
    adapters = [make_adapter(model, seed=n, targets=targets) for n in range(2)]
    bank = bank_of(model, max_adapters=2, max_rank=8)
    layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    embeddings = 2 * (512 + 64)
    assert bank.bank_bytes == 4 * 4 * (8 * (3 * layer + embeddings) + 1)
    for adapter in adapters:
        install(bank, adapter)
    assert 0.7 * bank.bank_bytes < bank.nbytes < bank.bank_bytes


# What cannot be mixed


class Flattening(nn.Module):
    """Gives its layer all tokens of a batch as one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x.reshape(1, -1, 8))


class Peeking(Flattening):
    """Reads its layer's weight."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.layer.weight.T


@pytest.mark.parametrize(
    "kind, said", [(Flattening, "mixes the rows"), (Peeking, "reads the weight of layer")]
)
def test_a_model_that_passes_the_rows_by_is_no_silent_base(kind: Any, said: str) -> None:
    model = kind()
    bank = bank_of(model)
    factors = install(bank, make_adapter(model, targets="layer", rank=2))
    x = mx.ones((2, 3, 8))
    with pytest.raises(RunError, match=said):
        mixed(bank, [((factors, 1.0),), ()], x)
    assert mixed(bank, [(), ()], x).shape[-1] == 8
