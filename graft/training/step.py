"""One update of an adapter: gradients over micro-batches, clipping, a guard, the optimizer.

Knows nothing of data, files or schedules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.runtime.cpu import CompiledStep
from graft.runtime.workers import Lanes, groups

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

# (inputs, targets, loss_mask), and documents where rows are packed.
Arrays = tuple[mx.array, ...]
Loss = Callable[..., tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class StepResult:
    """What an update saw.

    Attributes:
        loss: mean over the trained tokens of all micro-batches, in nats.
        tokens: how many those are.
        grad_norm: Euclidean norm of the whole gradient, before clipping.
        good: whether loss and norm were finite; if not, nothing was changed.
    """

    loss: float
    tokens: int
    grad_norm: float
    good: bool


class UpdateStep:
    """A callable that updates a model's adapter from micro-batches.

    The gradient is that of the mean loss over the tokens of all micro-batches together: each one's
    gradient weighs as its tokens do, so dividing a batch changes memory and not mathematics. Where
    the loss or the norm is not finite, there is no update: adapter and optimizer stay as they are.

    Args:
        model: with an adapter attached.
        loss: (model, inputs, targets, loss_mask[, documents]) -> (mean loss, trained tokens).
        optimizer: of `graft.training.optimizers.make_optimizer`.
        grad_clip: largest norm of the gradient; 0 does not clip.
        lanes: micro-batches at a time, as `graft.runtime.workers` has it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: optim.MultiOptimizer,
        *,
        grad_clip: float = 0.0,
        lanes: int = 1,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._grad_clip = grad_clip
        self._lane_count = lanes
        self._lanes = Lanes(_computing(model, loss))
        optimizer.init(model.trainable_parameters())
        self._states = [single.state for single in optimizer.optimizers]
        self._everything = [model.state, self._states, mx.random.state]
        self._accumulate = CompiledStep(self._add_micro_batches, self._everything)
        self._measure = CompiledStep(self._mean, [])
        self._update = CompiledStep(self._apply, self._everything)

    def __call__(self, micro_batches: Sequence[Arrays]) -> StepResult:
        """Update the adapter; a micro-batch is what `loss` takes, each array (rows, tokens)."""
        gradients, loss, norm, tokens = self._measure(self._sum(micro_batches, self._zeros()))
        good = bool((mx.isfinite(loss) & mx.isfinite(norm)).item())
        if good:
            self._update(gradients)
            # MLX computes in place what nobody else refers to.
            del gradients
            mx.eval(self._everything)
        return StepResult(loss.item(), int(tokens.item()), norm.item(), good)

    def rehearse(self, micro_batches: Sequence[Arrays], *, more: bool = False) -> None:
        """Do the work of an update and change nothing, to see what memory it takes.

        Args:
            micro_batches: one for each lane.
            more: whether an update has others besides, so that sums are there from the start.
        """
        before = {name: _copy(array) for name, array in self.state().items()}
        zeros = self._zeros()
        mx.eval(self._everything, zeros if more else [])
        gradients, loss, norm, _ = self._measure(self._sum(micro_batches, zeros))
        del zeros
        mx.eval(loss, norm)
        self._update(gradients)
        del gradients
        mx.eval(self._everything)
        self.restore({name: array() for name, array in before.items()})

    def losses(self, micro_batches: Sequence[Arrays]) -> list[tuple[mx.array, mx.array]]:
        """Loss and tokens of each micro-batch, without an update, in the same lanes.

        Args:
            micro_batches: at most one for each lane.
        """
        weights = adapter_parameters(self._model)
        return self._lanes([(weights, arrays, False) for arrays in micro_batches])

    def close(self) -> None:
        """End the processes of other lanes; another update would start new ones."""
        self._lanes.close()

    @property
    def traces(self) -> tuple[int, int]:
        """How often the step was traced, and how often its shapes asked for it; 0 uncompiled."""
        parts = (self._accumulate, self._measure, self._update)
        return sum(part.traces for part in parts), sum(len(part.shapes) for part in parts)

    def state(self) -> dict[str, mx.array]:
        """Adapter and optimizer as named arrays: `adapter.PATH` and `optimizer.NUMBER`."""
        adapter = {f"adapter.{path}": w for path, w in adapter_parameters(self._model).items()}
        leaves = enumerate(_leaves(self._states))
        return adapter | {f"optimizer.{number}": array for number, (_, _, array) in leaves}

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: names or shapes are not those of this adapter and optimizer.
        """
        own = self.state()
        if {n: a.shape for n, a in own.items()} != {n: a.shape for n, a in arrays.items()}:
            raise ValueError("the saved state is that of another adapter or optimizer")
        for number, (holder, key, _) in enumerate(_leaves(self._states)):
            holder[key] = arrays[f"optimizer.{number}"]
        paths = adapter_parameters(self._model)
        weights = [(path, arrays[f"adapter.{path}"]) for path in paths]
        self._model.update(tree_unflatten(weights))
        mx.eval(self._everything)

    def _sum(self, micro_batches: Sequence[Arrays], sums: dict[str, Any]) -> dict[str, Any]:
        for group in groups(micro_batches, self._lane_count):
            sums = self._accumulate(sums, group)
            mx.eval(sums)
        return sums

    def _zeros(self) -> dict[str, Any]:
        gradients = {p: mx.zeros_like(w) for p, w in adapter_parameters(self._model).items()}
        return {"loss": mx.array(0.0), "tokens": mx.array(0.0), "gradients": gradients}

    def _add_micro_batches(self, sums: dict[str, Any], group: Sequence[Arrays]) -> dict[str, Any]:
        weights = adapter_parameters(self._model)
        for (mean, tokens), tree in self._lanes([(weights, arrays, True) for arrays in group]):
            gradients = dict(tree_flatten(tree))
            sums = {
                "loss": sums["loss"] + mean * tokens,
                "tokens": sums["tokens"] + tokens,
                "gradients": {p: s + gradients[p] * tokens for p, s in sums["gradients"].items()},
            }
        return sums

    def _mean(self, sums: dict[str, Any]) -> tuple[dict[str, mx.array], *tuple[mx.array, ...]]:
        tokens = mx.maximum(sums["tokens"], 1)
        gradients = {path: total / tokens for path, total in sums["gradients"].items()}
        gradients, norm = clip(gradients, self._grad_clip)
        return gradients, sums["loss"] / tokens, norm, sums["tokens"]

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        self._optimizer.update(self._model, tree_unflatten(list(gradients.items())))


def _computing(model: nn.Module, loss: Loss) -> Callable[[Any], Any]:
    """A function of (adapter parameters, micro-batch, whether to train).

    It gives loss and tokens, and with them the gradient where it is to train.
    """
    gradient = nn.value_and_grad(model, loss)

    def compute(item: tuple[dict[str, mx.array], Arrays, bool]) -> Any:
        weights, arrays, training = item
        adapter = tree_unflatten(list(weights.items()))
        model.train(training)
        model.update(adapter)
        result = (gradient if training else loss)(model, *arrays)
        # Tracing leaves its own arrays in the model.
        model.update(adapter)
        return result

    return compute


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters of a model by their paths."""
    return dict(tree_flatten(model.trainable_parameters()))


def clip(gradients: dict[str, mx.array], limit: float) -> tuple[dict[str, mx.array], mx.array]:
    """Scale gradients down to a norm of at most `limit` (0: do not); also their norm before."""
    squares = [mx.square(gradient.astype(mx.float32)).sum() for gradient in gradients.values()]
    norm = mx.sqrt(sum(squares, mx.array(0.0)))
    if not limit:
        return gradients, norm
    factor = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {path: gradient * factor for path, gradient in gradients.items()}, norm


def _copy(array: mx.array) -> Callable[[], mx.array]:
    """What gives the array again, without a reference to it, nor memory of MLX."""
    dtype, shape, raw = array.dtype, array.shape, np.array(array.reshape(-1).view(mx.uint8))
    return lambda: mx.array(raw).view(dtype).reshape(shape)


def _leaves(tree: Any) -> list[tuple[Any, Any, mx.array]]:
    """(container, key, array) of every array in a tree of dicts and lists, in a fixed order."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: list[tuple[Any, Any, mx.array]] = []
    for key, value in items:
        found += [(tree, key, value)] if isinstance(value, mx.array) else _leaves(value)
    return found
