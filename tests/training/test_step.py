"""One update: accumulation by tokens, clipping, and the guard that changes nothing."""

from typing import Any

from graft.adapters.attach import attach
from graft.adapters.layer_config import LayerConfig
from graft.data.batches import TrainingBatches
from graft.data.examples import Example
from graft.errors import InputError
from graft.runtime import cpu as backend
from graft.training import step as step_module
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import OPTIMIZERS, make_optimizer, set_learning_rate
from graft.training.step import UpdateStep, adapter_parameters, clip

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.fast_cases import mean_loss
from support.tiny import LLAMA, make_model

CONFIG = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
RATE = 1e-2


def adapted(*, reverse: bool = False) -> nn.Module:
    model = make_model(CONFIG)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    attach(model, {path: LayerConfig(4, 8.0) for path in paths})
    if reverse:
        for _, module in model.named_modules():
            children = list(module.items())
            dict.clear(module)
            dict.update(module, children[::-1])
    model.train()
    return model


def uneven_rows(count: int = 24) -> list[Example]:
    """Rows of 3 to 60 tokens, some of them mostly prompt."""
    generator = np.random.default_rng(5)
    rows = []
    for length in generator.integers(3, 60, count):
        loss_mask = np.arange(length) >= generator.integers(1, length)
        rows.append(Example(generator.integers(0, 512, length).astype(np.int32), loss_mask))
    return rows


def batches_of(rows: list[Example], size: int, accumulation: int) -> TrainingBatches:
    return TrainingBatches(rows, size, accumulation=accumulation, seed=1)


def make_step(
    model: nn.Module, name: str = "adam", *, loss: Any = sft, grad_clip: float = 0.0
) -> UpdateStep:
    optimizer = make_optimizer(name)
    update = UpdateStep(model, loss, optimizer, grad_clip=grad_clip)
    set_learning_rate(optimizer, RATE)
    return update


def arrays(batches: list[Any]) -> list[dict[str, mx.array]]:
    return [batch.to_mlx() for batch in batches]


def train(size: int, accumulation: int, *, steps: int = 6) -> tuple[UpdateStep, list[Any]]:
    update = make_step(adapted(), "adamw", grad_clip=0.5)
    batches = batches_of(uneven_rows(), size, accumulation)
    return update, [update(arrays(next(batches))) for _ in range(steps)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("more", [False, True])
def test_a_rehearsal_changes_nothing(name: str, more: bool) -> None:
    """Neither adapter nor optimizer, before the first update and after."""
    batches = batches_of(uneven_rows(), 4, 1)
    update, other = make_step(adapted(), name), make_step(adapted(), name)
    for _ in range(2):
        update.dry_run(arrays(batches.widest()), more=more)
        step = arrays(next(batches))
        assert update(step) == other(step)
    for key, array in other.state().items():
        assert mx.array_equal(update.state()[key], array), key


@pytest.mark.usefixtures("exact_memory")
@pytest.mark.parametrize(("name", "most"), [("adam", 4), ("lion", 5), ("sgd", 3)])
def test_an_update_computes_in_place(name: str, most: float) -> None:
    """Of all weights: beside them and the moments it takes gradients and hardly anything else.

    Adam takes 10 times the weights where nothing is computed in place.
    """
    model = make_model({**LLAMA, "hidden_size": 256, "vocab_size": 4096})
    model.unfreeze()
    size = sum(array.nbytes for array in adapter_parameters(model).values())
    update = make_step(model, name)
    ids = mx.zeros((1, 4), mx.int32)
    row = {"inputs": ids, "targets": ids, "loss_mask": mx.ones((1, 4), mx.bool_)}
    update([row])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    update([row])
    assert mx.get_peak_memory() - before < most * size


@pytest.mark.parametrize("size, accumulation", [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_dividing_a_batch_changes_memory_and_not_mathematics(size: int, accumulation: int) -> None:
    """Rows of very uneven lengths, two epochs, the adapter and both moments."""
    whole, expected = train(size * accumulation, 1)
    parts, found = train(size, accumulation)
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    for name, array in whole.state().items():
        scale = mx.abs(array).max().item()
        assert mx.abs(parts.state()[name] - array).max().item() <= 2e-4 * scale, name


def test_the_gradient_is_that_of_the_mean_over_all_tokens() -> None:
    """By plain gradient descent, against the gradient of one whole batch."""
    batch = arrays(next(batches_of(uneven_rows(), 8, 1)))
    model = adapted()
    before = adapter_parameters(model)
    (_, tokens), gradient = nn.value_and_grad(model, mean_loss)(model, batch[0])
    flat = dict(step_module.tree_flatten(gradient))
    norm = np.sqrt(sum(np.square(np.array(g)).sum() for g in flat.values()))
    result = make_step(model, "sgd")(arrays(next(batches_of(uneven_rows(), 2, 4))))
    assert result.tokens == tokens.item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    for path, after in adapter_parameters(model).items():
        change = np.array(before[path] - after)
        np.testing.assert_allclose(change, RATE * np.array(flat[path]), rtol=1e-3, atol=1e-7)


Batch = dict[str, mx.array]


def nan_loss(model: nn.Module, batch: Batch) -> Any:
    """Not a number where a batch begins with token 0."""
    total, tokens, metrics = sft(model, batch)
    return mx.where(batch["inputs"][0, 0] == 0, mx.nan, total), tokens, metrics


@mx.custom_function
def with_infinite_gradient(x: mx.array, poisoned: mx.array) -> mx.array:
    return x


@with_infinite_gradient.vjp
def infinite(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    factor = mx.where(primals[1], mx.inf, 1.0)
    return cotangent * factor, mx.zeros_like(primals[1])


def inf_gradient(model: nn.Module, batch: Batch) -> Any:
    """A finite loss whose gradient is infinite where a batch begins with token 0."""
    total, tokens, metrics = sft(model, batch)
    poisoned = (batch["inputs"][0, 0] == 0).astype(mx.float32)
    return with_infinite_gradient(total, poisoned), tokens, metrics


def poisoned(batch: Batch) -> Batch:
    """The batch, beginning with token 0."""
    inputs = np.array(batch["inputs"])
    inputs[0, 0] = 0
    return batch | {"inputs": mx.array(inputs)}


def copies(update: UpdateStep) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in update.state().items()}


@pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("loss", [nan_loss, inf_gradient])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name: str, loss: Any, position: int) -> None:
    """Neither adapter nor moments nor the count of steps, bit for bit, wherever the bad rows are;
    and the steps after it are those of a run without it."""
    good = [arrays(next(batches_of(uneven_rows(), 2, 2))) for _ in range(2)]
    bad = list(good[0])
    bad[position] = poisoned(bad[position])
    update, undisturbed = (make_step(adapted(), name, loss=loss) for _ in range(2))
    for one in (update, undisturbed):
        assert one(good[0]).finite
    before = copies(update)
    result = update(bad)
    assert not result.finite
    assert np.isfinite(result.loss) == (loss is inf_gradient)
    assert copies(update) == before
    for one in (update, undisturbed):
        assert one(good[1]).finite
    assert copies(update) == copies(undisturbed) != before


def test_a_step_without_trained_tokens_is_finite_and_of_loss_zero() -> None:
    """Masked prompts that fill every row are 0 / 0 elsewhere."""
    batch = [
        {**each, "loss_mask": mx.zeros_like(each["loss_mask"])}
        for each in arrays(next(batches_of(uneven_rows(), 2, 1)))
    ]
    result = make_step(adapted())(batch)
    assert (result.loss, result.tokens, result.grad_norm, result.finite) == (0.0, 0, 0.0, True)


def test_clipping_scales_the_whole_gradient_to_its_limit() -> None:
    """3-4-5 and 5-12-13: the norm of both together is 13."""
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([[12.0]])}
    same, norm = clip(gradients, 0)
    assert same is gradients and norm.item() == pytest.approx(13)
    less, norm = clip(gradients, 1.3)
    assert norm.item() == pytest.approx(13)
    assert np.array(less["a"]) == pytest.approx([0.3, 0.4]) and less["b"].item() == pytest.approx(
        1.2
    )
    unchanged, _ = clip(gradients, 20)
    assert all(mx.array_equal(unchanged[name], gradients[name]).item() for name in gradients)


def test_a_clipped_step_moves_by_its_limit_and_tells_the_norm_before() -> None:
    model = adapted()
    before = adapter_parameters(model)
    result = make_step(model, "sgd", grad_clip=1e-3)(arrays(next(batches_of(uneven_rows(), 4, 1))))
    squares = [
        np.square(np.array(a - before[p])).sum() for p, a in adapter_parameters(model).items()
    ]
    assert np.sqrt(sum(squares)) == pytest.approx(RATE * 1e-3, rel=1e-2)
    assert result.grad_norm > 1e-2


def test_the_state_of_another_adapter_is_refused() -> None:
    update = make_step(adapted())
    state = update.state()
    with pytest.raises(InputError, match="another adapter or optimizer"):
        make_step(adapted(), "sgd").restore(state)
    state.popitem()
    with pytest.raises(InputError, match="another adapter or optimizer"):
        update.restore(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_does_not_depend_on_the_order_of_layers(name: str) -> None:
    """Adapters attached in another order: each moment is that of its parameter, by name."""
    step = arrays(next(batches_of(uneven_rows(), 2, 2)))
    first, other = (make_step(adapted(reverse=reverse), name) for reverse in (False, True))
    paths = [list(adapter_parameters(update._model)) for update in (first, other)]
    assert paths[0] != paths[1] and sorted(paths[0]) == sorted(paths[1])
    first(step)
    other.restore(first.state())
    for key, array in first.state().items():
        assert mx.array_equal(other.state()[key], array), key
    first(step), other(step)
    for key, array in first.state().items():
        scale = mx.abs(array).max().item() + 1e-6
        assert mx.abs(other.state()[key] - array).max().item() <= 1e-4 * scale, key


def test_the_names_are_those_of_the_parameters() -> None:
    state = make_step(adapted(), "adam").state()
    parameter = "model.layers.0.self_attn.q_proj.lora_a"
    moments = {f"optimizer.{parameter}.m", f"optimizer.{parameter}.v"}
    assert moments | {f"adapter.{parameter}", "optimizer.0.step"} <= state.keys()
    assert state[f"optimizer.{parameter}.m"].shape == state[f"adapter.{parameter}"].shape


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_numbered_state_of_an_earlier_version_is_read(name: str) -> None:
    """Then: the arrays of the optimizers' states in the order that they have in memory."""
    batches = [arrays(next(batches_of(uneven_rows(), 2, 2))) for _ in range(2)]
    first, other = (make_step(adapted(), name) for _ in range(2))
    first(batches[0])
    numbered = {n: array for n, array in first.state().items() if n.startswith("adapter.")}
    states = [single.state for single in first._optimizer.optimizers]
    leaves = [array for state in states for _, array in step_module.tree_flatten(state)]
    other.restore(numbered | {f"optimizer.{n}": array for n, array in enumerate(leaves)})
    assert copies(first) == copies(other)
    assert first(batches[1]) == other(batches[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_step_goes_on_as_the_first_did(name: str) -> None:
    batches = [arrays(next(batches_of(uneven_rows(), 2, 2))) for _ in range(4)]
    one, other = (make_step(adapted(), name) for _ in range(2))
    for batch in batches[:2]:
        one(batch)
    other.restore(one.state())
    for update in (one, other):
        for batch in batches[2:]:
            update(batch)
    assert copies(one) == copies(other)


class Bigrams(nn.Module):
    """The least language model: it compiles in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 8)
        self.head = nn.Linear(8, 512)

    def __call__(self, inputs: mx.array) -> mx.array:
        return self.head(self.embedding(inputs))


def test_compiled_steps_guard_as_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the decision stands within the compiled step."""
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: False)
    model = Bigrams()
    attach(model, {"head": LayerConfig(2, 4.0)})
    update = make_step(model, loss=nan_loss)
    batch = arrays(next(batches_of(uneven_rows(), 2, 1)))
    before = copies(update)
    assert update(batch).finite and copies(update) != before
    before = copies(update)
    assert not update([poisoned(batch[0])]).finite
    assert copies(update) == before
    assert update(batch).finite
    assert update.traces == (3, 3)
