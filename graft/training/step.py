"""One optimizer step: gradients over micro-batches, clipping, a check that they are finite, update.

Knows nothing of data, files or schedules.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.errors import InputError
from graft.runtime.cpu import CompiledStep
from graft.runtime.workers import Workers, in_groups
from graft.training.objectives import BatchArrays, Objective
from graft.training.optimizers import (
    named_state,
    restore_named_state,
    set_state_array,
    state_arrays,
)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

# Mean loss, weight and metrics of a micro-batch.
Measured = tuple[mx.array, mx.array, dict[str, mx.array]]


@dataclass(frozen=True)
class StepResult:
    """What an update reports.

    Attributes:
        loss: sum of the objective over all micro-batches, divided by their weight.
        tokens: that weight; for supervised fine-tuning, the tokens of the loss mask.
        grad_norm: Euclidean norm of the whole gradient, before clipping.
        finite: whether loss and norm were finite; if not, nothing was changed.
        metrics: the objective's further sums, divided by the weight.
    """

    loss: float
    tokens: int
    grad_norm: float
    finite: bool
    metrics: dict[str, float] = field(default_factory=dict)


class UpdateStep:
    """A callable that updates a model's adapter from micro-batches.

    The gradient is that of the mean loss over all micro-batches together: each one's gradient is
    weighted by its tokens, so dividing a batch changes memory use and not the result. If the loss
    or the norm is not finite, adapter and optimizer stay as they are.

    Args:
        model: with an adapter attached.
        objective: what to minimize, from `graft.training.objectives`.
        optimizer: from `graft.training.optimizers.make_optimizer`.
        grad_clip: largest norm of the gradient; 0 does not clip.
        workers: micro-batches computed at a time, each by a process.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: optim.MultiOptimizer,
        *,
        grad_clip: float = 0.0,
        workers: int = 1,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._grad_clip = grad_clip
        self._worker_count = workers
        self._workers = Workers(_worker_function(model, mean_loss(objective)))
        optimizer.init(model.trainable_parameters())
        states = [single.state for single in optimizer.optimizers]
        self._everything = [model.state, states, mx.random.state]
        self._accumulate = CompiledStep(self._add_micro_batches, self._everything)
        self._finish = CompiledStep(self._mean, [])
        self._update = CompiledStep(self._apply, self._everything)

    def __call__(self, micro_batches: Sequence[BatchArrays]) -> StepResult:
        """Update the adapter from micro-batches, each as the objective takes it."""
        gradients, norm, sums = self._finish(self._sum(micro_batches, self._zeros()))
        finite = bool((mx.isfinite(sums["loss"]) & mx.isfinite(norm)).item())
        if finite:
            self._update(gradients)
            # MLX computes in place what nobody else refers to.
            del gradients
            mx.eval(self._everything)
        metrics = {name: value.item() for name, value in sums["metrics"].items()}
        loss, tokens = sums["loss"].item(), int(sums["tokens"].item())
        return StepResult(loss, tokens, norm.item(), finite, metrics)

    def dry_run(self, micro_batches: Sequence[BatchArrays], *, more: bool = False) -> None:
        """Do the work of an update without changing anything, to see how much memory it takes.

        Args:
            micro_batches: one for each worker.
            more: whether an update has further ones, so that sums exist from the start.
        """
        weights = {path: _copy(array) for path, array in adapter_parameters(self._model).items()}
        states = [(n, path, _copy(array)) for n, path, array in state_arrays(self._optimizer)]
        zeros = self._zeros()
        mx.eval(self._everything, zeros if more else [])
        gradients, norm, sums = self._finish(self._sum(micro_batches, zeros))
        del zeros
        mx.eval(sums, norm)
        self._update(gradients)
        del gradients, sums
        mx.eval(self._everything)
        self._set_adapter({path: array() for path, array in weights.items()})
        for number, path, array in states:
            set_state_array(self._optimizer, number, path, array())
        mx.eval(self._everything)

    def losses(self, micro_batches: Sequence[BatchArrays]) -> list[Any]:
        """Mean loss, weight and metrics of each micro-batch, without an update.

        Args:
            micro_batches: at most one for each worker.
        """
        weights = adapter_parameters(self._model)
        return self._workers([(weights, arrays, False) for arrays in micro_batches])

    def is_finite(self, micro_batch: BatchArrays | None = None) -> bool:
        """Whether adapter and optimizer are finite, and the loss of a micro-batch with them.

        Args:
            micro_batch: one whose loss was finite before the last update.
        """
        finite = [mx.isfinite(array).all() for array in self.state().values()]
        if micro_batch is not None:
            finite += [mx.isfinite(loss) for loss, _, _ in self.losses([micro_batch])]
        return bool(mx.all(mx.stack(finite)).item())

    def close(self) -> None:
        """End the worker processes; another update would start new ones."""
        self._workers.close()

    @property
    def traces(self) -> tuple[int, int]:
        """How often the step was traced and how often its shapes required it; 0 if not compiled."""
        parts = (self._accumulate, self._finish, self._update)
        return sum(part.traces for part in parts), sum(len(part.shapes) for part in parts)

    def state(self) -> dict[str, mx.array]:
        """Adapter and optimizer as arrays named by parameter path.

        `adapter.PATH` is a parameter, `optimizer.PATH.m` a moment of it, and `optimizer.0.step`
        belongs to the first of the two optimizers.
        """
        weights = adapter_parameters(self._model)
        adapter = {f"adapter.{path}": array for path, array in weights.items()}
        named = named_state(self._optimizer, weights)
        return adapter | {f"optimizer.{name}": array for name, array in named.items()}

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Put back what `state` returned, or what earlier versions saved (`optimizer.NUMBER`).

        Raises:
            InputError: names or shapes are those of another adapter or optimizer.
        """
        numbered = any(re.fullmatch(r"optimizer\.\d+", name) for name in arrays)
        expected = self._numbered_state() if numbered else self.state()
        if {n: a.shape for n, a in expected.items()} != {n: a.shape for n, a in arrays.items()}:
            raise InputError("the saved state is that of another adapter or optimizer")
        weights = adapter_parameters(self._model)
        if numbered:
            for place, (number, path, _) in enumerate(state_arrays(self._optimizer)):
                set_state_array(self._optimizer, number, path, arrays[f"optimizer.{place}"])
        else:
            named = {
                name.removeprefix("optimizer."): array
                for name, array in arrays.items()
                if name.startswith("optimizer.")
            }
            restore_named_state(self._optimizer, weights, named)
        self._set_adapter({path: arrays[f"adapter.{path}"] for path in weights})
        mx.eval(self._everything)

    def _numbered_state(self) -> dict[str, mx.array]:
        weights = adapter_parameters(self._model)
        arrays = {f"adapter.{path}": array for path, array in weights.items()}
        states = enumerate(state_arrays(self._optimizer))
        return arrays | {f"optimizer.{place}": array for place, (_, _, array) in states}

    def _set_adapter(self, weights: Mapping[str, mx.array]) -> None:
        self._model.update(tree_unflatten(list(weights.items())))

    def _sum(self, micro_batches: Sequence[BatchArrays], sums: dict[str, Any]) -> dict[str, Any]:
        for group in in_groups(micro_batches, self._worker_count):
            sums = self._accumulate(sums, group)
            mx.eval(sums)
        return sums

    def _zeros(self) -> dict[str, Any]:
        gradients = {p: mx.zeros_like(w) for p, w in adapter_parameters(self._model).items()}
        zero = {"loss": mx.array(0.0), "tokens": mx.array(0.0)}
        return {**zero, "gradients": gradients, "metrics": {}}

    def _add_micro_batches(
        self, sums: dict[str, Any], group: Sequence[BatchArrays]
    ) -> dict[str, Any]:
        weights = adapter_parameters(self._model)
        for (mean, tokens, metrics), tree in self._workers([(weights, b, True) for b in group]):
            gradients = dict(tree_flatten(tree))
            before = sums["metrics"]
            sums = {
                "loss": sums["loss"] + mean * tokens,
                "tokens": sums["tokens"] + tokens,
                "gradients": {p: s + gradients[p] * tokens for p, s in sums["gradients"].items()},
                "metrics": {n: before.get(n, 0.0) + value for n, value in metrics.items()},
            }
        return sums

    def _mean(self, sums: dict[str, Any]) -> tuple[dict[str, mx.array], mx.array, dict[str, Any]]:
        tokens = mx.maximum(sums["tokens"], 1)
        gradients = {path: total / tokens for path, total in sums["gradients"].items()}
        gradients, norm = clip(gradients, self._grad_clip)
        metrics = {name: total / tokens for name, total in sums["metrics"].items()}
        means = {"loss": sums["loss"] / tokens, "tokens": sums["tokens"], "metrics": metrics}
        return gradients, norm, means

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        self._optimizer.update(self._model, tree_unflatten(list(gradients.items())))


def mean_loss(objective: Objective) -> Callable[[nn.Module, BatchArrays], Measured]:
    """The objective divided by its weight.

    Means are what is differentiated: half precision may not hold the gradient of a sum.
    """

    def mean(model: nn.Module, batch: BatchArrays) -> Measured:
        total, weight, metrics = objective(model, batch)
        return total / mx.maximum(weight, 1), weight, metrics

    return mean


def _worker_function(
    model: nn.Module, loss: Callable[[nn.Module, BatchArrays], Measured]
) -> Callable[[Any], Any]:
    """A function of (adapter parameters, micro-batch, whether to train).

    It returns mean loss, weight and metrics, and with them the gradient if it is to train.
    """
    gradient = nn.value_and_grad(model, loss)

    def compute(item: tuple[dict[str, mx.array], BatchArrays, bool]) -> Any:
        weights, batch, training = item
        adapter = tree_unflatten(list(weights.items()))
        model.train(training)
        model.update(adapter)
        result = (gradient if training else loss)(model, batch)
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
    """A function that returns the array again; it holds no reference to it and no MLX memory."""
    dtype, shape, raw = array.dtype, array.shape, np.array(array.reshape(-1).view(mx.uint8))
    return lambda: mx.array(raw).view(dtype).reshape(shape)
