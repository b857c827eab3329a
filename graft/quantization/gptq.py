"""GPTQ: quantizes a weight so that the layer's outputs, not the weight's entries, change little.

The columns are rounded one after another. The error of each column is compensated by the columns
that follow, as far as the layer's inputs correlate:

    w_k' = w_k - e_j U_jk  for k > j,    e_j = (w_j - q_j) / U_jj,    U^T U = (X^T X)^-1

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), https://arxiv.org/abs/2210.17323, algorithm 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.data.collate import Batch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

DAMPING = 0.01
GRAM_BYTES = 1 << 28


class _Recorder(nn.Module):
    """Runs a layer and accumulates the Gram matrix of its inputs, X^T X, (inputs, inputs)."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.gram = mx.zeros((inputs, inputs))

    def __call__(self, x: mx.array, *others: Any) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.gram = self.gram + rows.T @ rows
        return self.layer(x, *others)


def grams(
    model: nn.Module, batches: Sequence[Batch], inputs: Mapping[str, int]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the Gram matrix X^T X of each layer's inputs over some text.

    A pass over the text covers as many layers as fit into `GRAM_BYTES`.

    Args:
        model: the model to run; it is restored after each pass.
        batches: the text.
        inputs: from path to the layer's number of inputs.
    """
    waiting = list(inputs)
    while waiting:
        chosen: list[str] = []
        room = GRAM_BYTES
        while waiting and (not chosen or room >= 4 * inputs[waiting[0]] ** 2):
            chosen.append(waiting.pop(0))
            room -= 4 * inputs[chosen[-1]] ** 2
        modules = dict(model.named_modules())
        recorders = {path: _Recorder(modules[path], inputs[path]) for path in chosen}
        model.update_modules(tree_unflatten(list(recorders.items())))
        for batch in batches:
            mx.eval(model(mx.array(batch["inputs"])), [r.gram for r in recorders.values()])
        model.update_modules(tree_unflatten([(path, modules[path]) for path in chosen]))
        for path in chosen:
            yield path, np.array(recorders.pop(path).gram)


def quantize_for(
    weight: mx.array, gram: NDArray[np.float32], *, group_size: int, bits: int
) -> dict[str, mx.array]:
    """Packed weight, scales and biases of a linear layer, in MLX's affine mode.

    Args:
        weight: the weight, (outputs, inputs).
        gram: X^T X of the layer's inputs, (inputs, inputs).
        group_size: the number of weights that share a scale and a bias.
        bits: the bits per weight.
    """
    remaining = np.array(weight.astype(mx.float32))
    upper = _upper_of_inverse(gram)
    codes = np.zeros(remaining.shape, np.uint8)
    scales, biases = [], []
    for start in range(0, remaining.shape[1], group_size):
        stop = start + group_size
        group = remaining[:, start:stop]
        _, scale, bias = mx.quantize(
            mx.array(group).astype(weight.dtype), group_size=group_size, bits=bits
        )
        scales.append(scale)
        biases.append(bias)
        steps = np.array(scale.astype(mx.float32))[:, 0], np.array(bias.astype(mx.float32))[:, 0]
        block = upper[start:stop, start:stop]
        codes[:, start:stop], errors = _round_group(group, block, *steps, largest=2**bits - 1)
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    return {
        "weight": pack_codes(codes, bits),
        "scales": mx.concatenate(scales, axis=1),
        "biases": mx.concatenate(biases, axis=1),
    }


def _round_group(
    group: NDArray[np.float32],
    upper: NDArray[np.float32],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    *,
    largest: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The codes of a group's columns, and the error of each column over its diagonal entry."""
    codes, errors = np.zeros(group.shape, np.uint8), np.zeros_like(group)
    for column in range(group.shape[1]):
        wanted = group[:, column]
        code = np.clip(np.round((wanted - bias) / scale), 0, largest)
        errors[:, column] = (wanted - (scale * code + bias)) / upper[column, column]
        codes[:, column] = code
        group[:, column + 1 :] -= np.outer(errors[:, column], upper[column, column + 1 :])
    return codes, errors


def _upper_of_inverse(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangular U with U^T U = (gram + damping)^-1."""
    damped = gram.astype(np.float64)
    mean = float(np.mean(np.diag(damped)))
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> mx.array:
    """Pack codes (rows, columns) like MLX: a stream of bits per row, the lowest bit first."""
    rows, columns = codes.shape
    stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(stream.reshape(rows, columns * bits), axis=1, bitorder="little")
    return mx.array(packed.view("<u4"))
