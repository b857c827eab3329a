"""Optimizers and learning-rate schedules by name, all of them MLX's own."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from graft.errors import InputError

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

# `set_learning_rate` replaces the learning rate before each step. Adam corrects the bias of its
# moments, as in the paper and in PyTorch; MLX's default does not.
OPTIMIZERS: dict[str, Callable[[float], optim.Optimizer]] = {
    "adam": lambda decay: optim.Adam(0.0, bias_correction=True),
    "adamw": lambda decay: optim.AdamW(0.0, weight_decay=decay, bias_correction=True),
    "sgd": lambda decay: optim.SGD(0.0, weight_decay=decay),
    "lion": lambda decay: optim.Lion(0.0, weight_decay=decay),
    "adafactor": lambda decay: optim.Adafactor(
        0.0, weight_decay=decay, scale_parameter=False, relative_step=False
    ),
    "muon": lambda decay: optim.Muon(0.0, weight_decay=decay),
}
WITHOUT_WEIGHT_DECAY = ("adam",)
LORA_B = "lora_b"
# Values of an array that is updated by itself.
LARGE = 2**18
# What these do to an entry depends on the rows and columns around it.
MATRIX_WISE = ("adafactor", "muon")

# What follows the warm-up: (learning rate, steps) -> its course over those steps.
SCHEDULES: dict[str, Callable[[float, int], Callable[[mx.array], mx.array]]] = {
    "constant": lambda rate, steps: lambda step: mx.array(rate),
    "linear": lambda rate, steps: optim.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, steps: optim.cosine_decay(rate, steps),
}


def make_optimizer(name: str, *, weight_decay: float = 0.0) -> optim.MultiOptimizer:
    """An optimizer for an adapter.

    There are two of the kind in it, the first for `lora_b` and the second for all else, so that
    their learning rates may differ (LoRA+: Hayou et al., 2024, https://arxiv.org/abs/2402.12354).

    Raises:
        InputError: weight decay for an optimizer that has none.
    """
    if weight_decay and name in WITHOUT_WEIGHT_DECAY:
        raise InputError(f"--weight-decay {weight_decay}: {name} has none; take adamw")
    pair = [OPTIMIZERS[name](weight_decay) for _ in range(2)]
    kind = optim.MultiOptimizer if name in MATRIX_WISE else _FlatOptimizer
    return kind(pair, [lambda path, array: path.endswith(LORA_B)])


def set_learning_rate(
    optimizer: optim.MultiOptimizer, rate: float, *, lora_plus_ratio: float = 1.0
) -> None:
    """Set the learning rate of an optimizer of `make_optimizer`: `rate`, times the ratio for B."""
    for_b, for_others = optimizer.optimizers
    for_b.learning_rate = rate * lora_plus_ratio
    for_others.learning_rate = rate


def make_schedule(
    name: str, rate: float, *, steps: int, warmup_steps: int = 0
) -> Callable[[int], float]:
    """The learning rate as a function of the step, counted from 1.

    It rises linearly to `rate` at step `warmup_steps`. From there it stays, or falls in a line or
    along half a cosine, to reach zero only after the last step.
    """
    course = SCHEDULES[name](rate, max(steps - warmup_steps, 1))
    if warmup_steps:
        rise = optim.linear_schedule(0.0, rate, warmup_steps)
        course = optim.join_schedules([rise, course], [warmup_steps + 1])
        return lambda step: _number(course(mx.array(step)))
    return lambda step: _number(course(mx.array(step - 1)))


class _FlatOptimizer(optim.MultiOptimizer):
    """Updates all small parameters of a group as one vector.

    An adapter has hundreds of small matrices, and calling an operation takes longer than it. Large
    ones stay as they are, since joining them takes memory.
    """

    def init(self, parameters: Any) -> None:
        super().init(_joined(dict(tree_flatten(parameters))))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        flat, everything = dict(tree_flatten(gradients)), dict(tree_flatten(parameters))
        before = {path: everything[path] for path in flat}
        after = super().apply_gradients(_joined(flat), _joined(before))
        return tree_unflatten(list(_divided(after, before).items()))


def _joined(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A vector of each group of arrays."""
    vectors = {}
    for name, paths in _groups(arrays).items():
        parts = [arrays[path].reshape(-1) for path in paths]
        vectors[name] = mx.concatenate(parts) if len(parts) > 1 else parts[0]
    return vectors


def _divided(vectors: Mapping[str, mx.array], like: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays that `_joined` made vectors of."""
    arrays = {}
    for name, paths in _groups(like).items():
        ends = list(accumulate(like[path].size for path in paths))
        for path, part in zip(paths, mx.split(vectors[name], ends[:-1]), strict=True):
            arrays[path] = part.reshape(like[path].shape)
    return arrays


def _groups(arrays: Mapping[str, mx.array]) -> dict[str, list[str]]:
    """The paths of small arrays of a type, those of `lora_b` apart, and of each large one."""
    groups: dict[str, list[str]] = {}
    for path, array in arrays.items():
        if array.size < LARGE:
            name = LORA_B if path.endswith(LORA_B) else "others"
        else:
            name = path.replace(".", " ")  # A dot would make a tree of it.
        groups.setdefault(f"{array.dtype} {name}".removeprefix("mlx.core."), []).append(path)
    return groups


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
