"""Optimizers and learning-rate schedules by name, all of them MLX's.

Also names the arrays of an optimizer's state after the parameters that they belong to, so that a
checkpoint does not depend on parameter order.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

from graft.errors import InputError

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

# `set_learning_rate` replaces the learning rate before each step. Adam corrects the bias of its
# moments, as in the paper and in PyTorch; MLX's default does not.
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda decay, **more: optim.Adam(0.0, bias_correction=True, **more),
    "adamw": lambda decay, **more: optim.AdamW(
        0.0, weight_decay=decay, bias_correction=True, **more
    ),
    "sgd": lambda decay: optim.SGD(0.0, weight_decay=decay),
    "lion": lambda decay, **more: optim.Lion(0.0, weight_decay=decay, **more),
    "adafactor": lambda decay: optim.Adafactor(
        0.0, weight_decay=decay, scale_parameter=False, relative_step=False
    ),
    "muon": lambda decay: optim.Muon(0.0, weight_decay=decay),
}
WITHOUT_WEIGHT_DECAY = ("adam",)
# The decay rates of both moments, and what is added to the root of the second.
WITH_BETAS = ("adam", "adamw", "lion")
WITH_EPS = ("adam", "adamw")
LORA_B = "lora_b"
# Parameters of at least this size are updated one by one, smaller ones together.
LARGE_SIZE = 2**18
# Optimizers whose update of an entry depends on its row and column.
MATRIX_WISE = ("adafactor", "muon")

# After the warm-up: (peak rate, last rate, steps) -> the learning rate as a function of the step.
SCHEDULES: dict[str, Callable[[float, float, int], Callable[[mx.array], mx.array]]] = {
    "constant": lambda rate, least, steps: lambda step: mx.array(rate),
    "linear": lambda rate, least, steps: optim.linear_schedule(rate, least, steps),
    "cosine": lambda rate, least, steps: optim.cosine_decay(rate, steps, least),
}


def make_optimizer(
    name: str,
    *,
    weight_decay: float = 0.0,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
) -> optim.MultiOptimizer:
    """An optimizer for an adapter.

    It holds two of the same type, the first for `lora_b` and the second for everything else, so
    that their learning rates can differ (LoRA+: Hayou et al., 2024,
    https://arxiv.org/abs/2402.12354).

    Args:
        name: one of `OPTIMIZERS`.
        weight_decay: of the decoupled kind, but for plain gradient descent.
        betas: the decay rates of the two moments; by default MLX's.
        eps: added to the root of the second moment; by default MLX's.

    Raises:
        InputError: the optimizer has no such setting.
    """
    if weight_decay and name in WITHOUT_WEIGHT_DECAY:
        raise InputError(f"--weight-decay {weight_decay}: {name} has none; use --optimizer adamw")
    settings: dict[str, Any] = {}
    for key, value, having in (("betas", betas, WITH_BETAS), ("eps", eps, WITH_EPS)):
        if value is not None and name not in having:
            raise InputError(f"--{key}: {name} has none; {', '.join(having)} have")
        settings |= {} if value is None else {key: value}
    pair = [OPTIMIZERS[name](weight_decay, **settings) for _ in range(2)]
    kind = optim.MultiOptimizer if name in MATRIX_WISE else _FlatOptimizer
    return kind(pair, [lambda path, array: path.endswith(LORA_B)])


def parse_betas(text: str | None) -> list[float] | None:
    """The numbers of `--betas`; `None` for the optimizer's own.

    Raises:
        InputError: they are not two numbers from 0 to below 1.
    """
    if text is None:
        return None
    try:
        betas = [float(part) for part in text.split(",")]
    except ValueError:
        betas = []
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"--betas {text[:40]}: give two numbers from 0 to below 1, as 0.9,0.95")
    return betas


def set_learning_rate(
    optimizer: optim.MultiOptimizer, rate: float, *, lora_plus_ratio: float = 1.0
) -> None:
    """Set the learning rate of an optimizer from `make_optimizer`; `lora_b` gets ratio * rate."""
    for_b, for_others = optimizer.optimizers
    for_b.learning_rate = rate * lora_plus_ratio
    for_others.learning_rate = rate


def make_schedule(
    name: str,
    rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    least: float = 0.0,
    cycles: int = 1,
) -> Callable[[int], float]:
    """The learning rate as a function of the step, counted from 1.

    It rises linearly to `rate` at step `warmup_steps`. From there it stays constant, or falls
    linearly or along half a cosine, reaching `least` only after the last step. With several cycles,
    it does so in each (SGDR: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983).

    Raises:
        InputError: the rate does not fall to `least`, or there are too few steps for the cycles.
    """
    after = max(steps - warmup_steps, 1)
    if least and (name == "constant" or least > rate):
        raise InputError(f"--min-learning-rate {least:g}: a {name} rate of {rate:g} stays above it")
    if cycles > 1 and (name == "constant" or cycles > after):
        raise InputError(f"--lr-cycles {cycles}: too many for a {name} rate over {after} steps")
    schedule = SCHEDULES[name](rate, least, after)
    if cycles > 1:
        schedule = _repeated(schedule, after, cycles)
    if warmup_steps:
        warm_up = optim.linear_schedule(0.0, rate, warmup_steps)
        schedule = optim.join_schedules([warm_up, schedule], [warmup_steps + 1])
        return lambda step: _number(schedule(mx.array(step)))
    return lambda step: _number(schedule(mx.array(step - 1)))


def _repeated(
    schedule: Callable[[mx.array], mx.array], steps: int, cycles: int
) -> Callable[[mx.array], mx.array]:
    """A schedule that runs `cycles` times within the steps that it was made for."""
    return lambda step: schedule(step * cycles % steps)


def named_state(
    optimizer: optim.MultiOptimizer, parameters: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """The arrays of an optimizer's state under names that do not depend on any order.

    Args:
        optimizer: of `make_optimizer`, initialized.
        parameters: what it updates, by path.

    Returns:
        `PATH.m`, `PATH.v` and so on for the parameter at PATH, and `0.step`, `1.learning_rate` and
        so on for the two optimizers.
    """
    groups = _groups(parameters)
    named = {}
    for number, path, array in state_arrays(optimizer):
        group, _, kind = path.rpartition(".")
        if group not in groups:
            named[_plain_name(number, path, parameters)] = array
            continue
        for parameter, part in _split(array, groups[group], parameters).items():
            named[f"{parameter}.{kind}"] = part
    return named


def restore_named_state(
    optimizer: optim.MultiOptimizer,
    parameters: Mapping[str, mx.array],
    named: Mapping[str, mx.array],
) -> None:
    """Put back the arrays that `named_state` returned.

    Raises:
        KeyError: an array is missing.
    """
    groups = _groups(parameters)
    for number, path, _ in state_arrays(optimizer):
        group, _, kind = path.rpartition(".")
        if group in groups:
            parts = [named[f"{parameter}.{kind}"].reshape(-1) for parameter in groups[group]]
            array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        else:
            array = named[_plain_name(number, path, parameters)]
        set_state_array(optimizer, number, path, array)


def state_arrays(optimizer: optim.MultiOptimizer) -> list[tuple[int, str, mx.array]]:
    """(optimizer, path in its state, array) of every array of an optimizer's state."""
    return [
        (number, path, array)
        for number, single in enumerate(optimizer.optimizers)
        for path, array in cast(Any, tree_flatten(single.state))
    ]


def set_state_array(
    optimizer: optim.MultiOptimizer, number: int, path: str, array: mx.array
) -> None:
    """Replace one of `state_arrays`."""
    holder: Any = optimizer.optimizers[number].state
    *keys, last = path.split(".")
    for key in keys:
        holder = holder[int(key) if isinstance(holder, list) else key]
    holder[last] = array


def _plain_name(number: int, path: str, parameters: Mapping[str, mx.array]) -> str:
    """A name for an array of no group: that of its parameter, or of one of the optimizers."""
    return path if path.rpartition(".")[0] in parameters else f"{number}.{path}"


class _FlatOptimizer(optim.MultiOptimizer):
    """Updates all small parameters of a group as one vector.

    An adapter has hundreds of small matrices, and starting an operation takes longer than the
    operation. Large matrices are updated one by one, since joining them takes memory.
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
    arrays: dict[str, mx.array] = {}
    for name, paths in _groups(like).items():
        arrays |= _split(vectors[name], paths, like)
    return arrays


def _split(
    vector: mx.array, paths: Sequence[str], like: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """The arrays at `paths` that a vector is made of, in the shapes of `like`."""
    ends = list(accumulate(like[path].size for path in paths))
    parts = mx.split(vector.reshape(-1), ends[:-1])
    return {path: part.reshape(like[path].shape) for path, part in zip(paths, parts, strict=True)}


def _groups(arrays: Mapping[str, mx.array]) -> dict[str, list[str]]:
    """The paths of small arrays of a type, those of `lora_b` apart, and of each large one."""
    groups: dict[str, list[str]] = {}
    for path, array in arrays.items():
        if array.size < LARGE_SIZE:
            name = LORA_B if path.endswith(LORA_B) else "others"
        else:
            name = path.replace(".", " ")  # A dot would nest it in the tree.
        groups.setdefault(f"{array.dtype} {name}".removeprefix("mlx.core."), []).append(path)
    return groups


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
