"""Optimizers are MLX's own; schedules against values by hand."""

import math
from collections.abc import Callable
from typing import Any

from graft.errors import InputError
from graft.training import optimizers
from graft.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    make_optimizer,
    make_schedule,
    parse_betas,
    set_learning_rate,
)
from graft.training.options import OPTIMIZERS as OPTIMIZER_NAMES
from graft.training.options import SCHEDULES as SCHEDULE_NAMES

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

RATE, DECAY = 0.01, 0.1
# What a person who reads MLX's documentation would write.
OWN: dict[str, Callable[[float], optim.Optimizer]] = {
    "adam": lambda decay: optim.Adam(RATE, bias_correction=True),
    "adamw": lambda decay: optim.AdamW(RATE, bias_correction=True, weight_decay=decay),
    "sgd": lambda decay: optim.SGD(RATE, weight_decay=decay),
    "lion": lambda decay: optim.Lion(RATE, weight_decay=decay),
    "adafactor": lambda decay: optim.Adafactor(
        RATE, scale_parameter=False, relative_step=False, weight_decay=decay
    ),
    "muon": lambda decay: optim.Muon(RATE, weight_decay=decay),
}
SHAPES = {"lora_a": (6, 2), "lora_b": (2, 5), "bias": (5,)}


def arrays(seed: int) -> dict[str, Any]:
    """A layer's parameters, or gradients of them."""
    generator = np.random.default_rng(seed)
    made = {n: mx.array(generator.normal(size=s).astype(np.float32)) for n, s in SHAPES.items()}
    return {"layer": made}


def trained(optimizer: optim.Optimizer, steps: int = 4) -> dict[str, mx.array]:
    parameters = arrays(0)
    optimizer.init(parameters)
    for step in range(1, steps + 1):
        parameters = optimizer.apply_gradients(arrays(step), parameters)
        mx.eval(parameters)
    return dict(tree_flatten(parameters))


def test_every_name_of_the_options_is_there() -> None:
    assert sorted(OPTIMIZERS) == sorted(OPTIMIZER_NAMES) == sorted(OWN)
    assert sorted(SCHEDULES) == sorted(SCHEDULE_NAMES)


@pytest.mark.parametrize(
    ("name", "decay"), [(n, d) for n in OWN for d in (0.0, DECAY) if n != "adam" or not d]
)
@pytest.mark.parametrize("large", [optimizers.LARGE_SIZE, 11, 1])
def test_an_optimizer_is_mlx_s_own(
    name: str, decay: float, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all arrays are joined, the smaller ones or none."""
    monkeypatch.setattr(optimizers, "LARGE_SIZE", large)
    optimizer = make_optimizer(name, weight_decay=decay)
    set_learning_rate(optimizer, RATE)
    found, expected = trained(optimizer), trained(OWN[name](decay))
    assert found.keys() == expected.keys()
    for path in expected:
        assert mx.array_equal(found[path], expected[path]).item(), path


@pytest.mark.parametrize("name", sorted(set(OWN) - {"adam"}))
def test_weight_decay_changes_what_every_optimizer_but_adam_does(name: str) -> None:
    changed = []
    for decay in (0.0, DECAY):
        optimizer = make_optimizer(name, weight_decay=decay)
        set_learning_rate(optimizer, RATE)
        changed.append(trained(optimizer))
    assert not mx.array_equal(changed[0]["layer.lora_a"], changed[1]["layer.lora_a"]).item()


def test_weight_decay_with_adam_is_refused_with_what_to_take() -> None:
    with pytest.raises(InputError, match=r"--weight-decay 0\.1: adam has none; use --opt"):
        make_optimizer("adam", weight_decay=0.1)


@pytest.mark.reference
@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adamw", 0.0), ("adamw", DECAY)])
def test_adam_is_pytorch_s(name: str, decay: float) -> None:
    torch = pytest.importorskip("torch")
    start = tree_map(np.array, arrays(0))["layer"]
    parameters = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in start.items()}
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    reference = kinds[name](parameters.values(), lr=RATE, weight_decay=decay)
    for step in range(1, 5):
        gradients = tree_map(np.array, arrays(step))["layer"]
        for path, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[path])
        reference.step()
    optimizer = make_optimizer(name, weight_decay=decay)
    set_learning_rate(optimizer, RATE)
    found = trained(optimizer)
    for path, parameter in parameters.items():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(np.array(found[f"layer.{path}"]), expected, rtol=2e-5, atol=2e-6)


def test_lora_plus_gives_b_its_rate_and_nothing_else() -> None:
    """With plain gradient descent the change is the rate times the gradient."""
    optimizer = make_optimizer("sgd")
    set_learning_rate(optimizer, RATE, lora_plus_ratio=16)
    before, gradients = dict(tree_flatten(arrays(0))), dict(tree_flatten(arrays(1)))
    after = trained(optimizer, steps=1)
    for path in before:
        rate = 16 * RATE if path.endswith("lora_b") else RATE
        change = np.array(before[path] - after[path])
        np.testing.assert_allclose(change, rate * np.array(gradients[path]), atol=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_a_step_leaves_the_learning_rate_as_it_was_set(name: str) -> None:
    optimizer = make_optimizer(name)
    set_learning_rate(optimizer, RATE, lora_plus_ratio=2)
    trained(optimizer)
    rates = [single.learning_rate.item() for single in optimizer.optimizers]
    assert rates == pytest.approx([2 * RATE, RATE])


def test_an_adapter_without_lora_b_can_be_trained() -> None:
    optimizer = make_optimizer("adam")
    set_learning_rate(optimizer, RATE)
    parameters = {"norm": {"weight": mx.ones((4,))}}
    optimizer.init(parameters)
    after = optimizer.apply_gradients({"norm": {"weight": mx.ones((4,))}}, parameters)
    # The first step of Adam moves by its rate.
    assert np.array(after["norm"]["weight"]) == pytest.approx(1 - RATE, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 0, [1 - n / 8 for n in range(8)]),
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]),
        (
            "cosine",
            4,
            [1 / 4, 2 / 4, 3 / 4, 1, *((1 + math.cos(math.pi * n / 4)) / 2 for n in range(4))],
        ),
    ],
)
def test_a_schedule_over_eight_steps(name: str, warmup: int, expected: list[float]) -> None:
    """It rises to the whole rate, and would reach zero only after the last step."""
    schedule = make_schedule(name, 0.5, steps=8, warmup_steps=warmup)
    found = [schedule(step) for step in range(1, 9)]
    assert found == pytest.approx([0.5 * share for share in expected], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_may_be_longer_than_the_run(name: str) -> None:
    schedule = make_schedule(name, 1.0, steps=3, warmup_steps=10)
    assert [schedule(step) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_betas_and_eps_are_mlx_s_own(name: str) -> None:
    given: dict[str, Any] = {"betas": [0.8, 0.95]} | ({} if name == "lion" else {"eps": 1e-3})
    kinds = {"adam": optim.Adam, "adamw": optim.AdamW, "lion": optim.Lion}
    own = {"adam": {"bias_correction": True}, "adamw": {"bias_correction": True, "weight_decay": 0}}
    optimizer = make_optimizer(name, **given)
    set_learning_rate(optimizer, RATE)
    found = trained(optimizer)
    expected = trained(kinds[name](RATE, **given, **own.get(name, {})))
    usual = trained(OWN[name](0.0))
    for path in expected:
        assert mx.array_equal(found[path], expected[path]).item(), path
        assert not mx.array_equal(found[path], usual[path]).item(), path


@pytest.mark.parametrize(("name", "setting"), [("sgd", "betas"), ("lion", "eps"), ("muon", "eps")])
def test_a_setting_that_an_optimizer_lacks_is_refused(name: str, setting: str) -> None:
    value = {"betas": [0.9, 0.99], "eps": 1e-6}[setting]
    with pytest.raises(InputError, match=f"--{setting}: {name} has none"):
        make_optimizer(name, **{setting: value})


@pytest.mark.parametrize("text", ["0.9", "0.9,1", "0.9,-1", "a,b", "0.9,0.9,0.9", "nan,0"])
def test_betas_are_two_numbers(text: str) -> None:
    assert parse_betas("0.9, 0.95") == [0.9, 0.95] and parse_betas(None) is None
    with pytest.raises(InputError, match="--betas"):
        parse_betas(text)


@pytest.mark.parametrize(
    ("name", "cycles", "expected"),
    [
        ("linear", 1, [1, 0.8, 0.6, 0.4]),
        ("linear", 2, [1, 0.6, 1, 0.6]),
        ("cosine", 1, [0.2 + 0.4 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]),
        ("cosine", 2, [1, 0.6, 1, 0.6]),
    ],
)
def test_a_schedule_with_a_least_rate_and_cycles(
    name: str, cycles: int, expected: list[float]
) -> None:
    """By hand: from 1 to 0.2 within the four steps, or within two of them twice."""
    for warmup in (0, 2):
        schedule = make_schedule(
            name, 1.0, steps=4 + warmup, warmup_steps=warmup, least=0.2, cycles=cycles
        )
        # With a warm-up, the peak is its last step and the first of the schedule.
        found = [schedule(step) for step in range(1 + warmup, 5 + warmup)]
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "constant", "least": 0.1}, "--min-learning-rate 0.1"),
        ({"name": "cosine", "least": 2.0}, "--min-learning-rate 2"),
        ({"name": "constant", "cycles": 2}, "--lr-cycles 2"),
        ({"name": "cosine", "cycles": 9}, "--lr-cycles 9"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_schedule(settings.pop("name"), 1.0, steps=8, **settings)
