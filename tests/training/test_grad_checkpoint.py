"""Gradient checkpointing: the same gradients, less memory."""

from typing import Any

from graft.adapters.attach import attach, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.data.examples import Split
from graft.errors import InputError
from graft.training.dry_run import MemoryTrial
from graft.training.grad_checkpoint import can_checkpoint, checkpoint_blocks
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import make_optimizer
from graft.training.options import from_mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.fast_cases import make_examples, mean_loss
from support.tiny import LLAMA, make_model


def adapted(config: dict[str, Any] = LLAMA, *, dropout: float = 0.0, bits: int = 0) -> nn.Module:
    """A model with an adapter that is not zero."""
    model = make_model(config)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    linear = (nn.Linear, nn.QuantizedLinear)
    paths = [p for p, m in model.named_modules() if isinstance(m, linear) and "layers" in p]
    attach(model, {path: LayerConfig(4, 8.0) for path in paths}, dropout=dropout)
    for _, layer in lora_layers(model):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    model.train()
    mx.eval(model.parameters())
    return model


def rows(shape: tuple[int, int], vocabulary: int) -> dict[str, mx.array]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (shape[0], shape[1] + 1))
    mask = mx.ones(shape, dtype=mx.bool_)
    return {
        "inputs": mx.array(tokens[:, :-1]),
        "targets": mx.array(tokens[:, 1:]),
        "loss_mask": mask,
    }


def gradients(model: nn.Module, *, passes: int = 1) -> tuple[float, dict[str, mx.array]]:
    """The loss and the gradients of the last of several passes that follow one seed."""
    mx.random.seed(7)
    step = nn.value_and_grad(model, mean_loss)
    for _ in range(passes):
        (loss, _), tree = step(model, rows((2, 24), 512))
        mx.eval(loss, tree)
    return loss.item(), dict(tree_flatten(tree))


@pytest.mark.parametrize("bits", [0, 4], ids=["whole", "quantized"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_gradients_are_equal(bits: int, dropout: float, passes: int) -> None:
    """Also where inputs drop out: the second time as the first, and the next pass as without."""
    model = adapted(dropout=dropout, bits=bits)
    loss, expected = gradients(model, passes=passes)
    checkpoint_blocks(model)
    same, found = gradients(model, passes=passes)
    assert same == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 3
    for name, gradient in expected.items():
        scale = mx.abs(gradient).max().item()
        assert scale > 0
        assert mx.abs(found[name] - gradient).max().item() <= 1e-5 * scale, name


@pytest.mark.slow
def test_compiled_steps_recompute_the_same_random_numbers() -> None:
    """As on a GPU, where the step is compiled with the state of the random numbers captured."""
    model = adapted({**LLAMA, "num_hidden_layers": 1}, dropout=0.3)
    batch = rows((2, 8), 512)

    def step() -> tuple[mx.array, Any]:
        (loss, _), tree = nn.value_and_grad(model, mean_loss)(model, batch)
        return loss, tree

    _, expected = gradients_of(step)
    checkpoint_blocks(model)
    state = [model.state, mx.random.state]
    _, found = gradients_of(mx.compile(step, inputs=state, outputs=state))
    for name, gradient in expected.items():
        scale = mx.abs(gradient).max().item()
        assert mx.abs(found[name] - gradient).max().item() <= 1e-5 * scale, name


def gradients_of(step: Any) -> tuple[float, dict[str, mx.array]]:
    mx.random.seed(7)
    loss, tree = step()
    mx.eval(loss, tree)
    return loss.item(), dict(tree_flatten(tree))


@pytest.mark.usefixtures("exact_memory")
def test_it_takes_less_memory() -> None:
    config = {**LLAMA, "num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 384}
    model = adapted(config)
    kept = peak(model)
    checkpoint_blocks(model)
    assert peak(model) < 0.6 * kept


def peak(model: nn.Module) -> int:
    """Bytes that a gradient takes above what is there before it."""
    batch = rows((4, 128), 512)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, mean_loss)(model, batch))
    return mx.get_peak_memory() - before


def test_the_layers_keep_their_types_and_names() -> None:
    model = adapted()
    types, names = [type(b) for b in model.layers], [n for n, _ in tree_flatten(model.parameters())]
    checkpoint_blocks(model)
    assert all(isinstance(b, t) for b, t in zip(model.layers, types, strict=True))
    assert [n for n, _ in tree_flatten(model.parameters())] == names


def test_doing_it_twice_is_doing_it_once() -> None:
    model = adapted()
    checkpoint_blocks(model)
    types = [type(block) for block in model.layers]
    checkpoint_blocks(model)
    assert [type(block) for block in model.layers] == types


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"--grad-checkpoint: Linear"):
        checkpoint_blocks(nn.Linear(2, 2))


class SharingBlock(nn.Module):
    """Adds what the block before it has left in a list that both hold, as shared keys are."""

    def __init__(self, shared: list[mx.array]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        object.__setattr__(self, "shared", shared)

    def __call__(self, x: mx.array) -> mx.array:
        before = self.shared.pop() if self.shared else mx.zeros_like(x)
        y = self.linear(x)
        self.shared.append(y)
        return x + mx.tanh(y + before)


class SharingModel(nn.Module):
    """A language model whose blocks pass states on beside their outputs."""

    def __init__(self) -> None:
        super().__init__()
        shared: list[mx.array] = []
        self.embedding = nn.Embedding(32, 16)
        self.layers = [SharingBlock(shared) for _ in range(3)]
        object.__setattr__(self, "shared", shared)

    def __call__(self, tokens: mx.array) -> mx.array:
        self.shared.clear()
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedding.as_linear(x)


def sharing() -> nn.Module:
    model = SharingModel()
    attach(model, {f"layers.{n}.linear": LayerConfig(2, 8.0) for n in range(3)})
    return model


def test_blocks_that_share_states_are_not_checkpointed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not can_checkpoint(sharing(), sft)
    assert capsys.readouterr().out.startswith("gradient checkpointing: off because")


def test_trying_leaves_the_blocks_and_the_random_numbers_as_they_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = adapted(dropout=0.3)
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(5)
    assert can_checkpoint(model, sft) and not capsys.readouterr().out
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected)
    assert not any(getattr(block, "recomputes", False) for block in model.layers)


@pytest.mark.parametrize("budget", [None, "1GB"])
def test_a_plan_does_not_count_on_it_where_it_changes_gradients(
    budget: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for `--grad-checkpoint` nor in the plan of a run that an earlier version saved."""
    options = from_mapping({"train": True, "grad_checkpoint": True, "memory_budget": budget})
    model, splits = sharing(), {"train": Split(make_examples([9, 6, 5, 7]))}
    for example in splits["train"].examples:
        example.tokens[:] %= 32
    trial = MemoryTrial(model, splits, options, make_optimizer("adam"), sft)
    saved = {"options": options.__dict__, "plan": {"rows": 4, "recompute": True, "peak_bytes": 9}}
    for state in (None, saved):
        assert trial.choose(state).recompute is False
        assert "gradient checkpointing: off because" in capsys.readouterr().out
    assert not any(getattr(block, "recomputes", False) for block in model.layers)
