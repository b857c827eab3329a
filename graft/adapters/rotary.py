"""The two orders of the rows of q and k, and the way between them.

Transformers rotates the first half of a head against the second ("halves"); Meta's checkpoints and
llama.cpp's files rotate neighbours ("interleaved"). An update of q or k has its outputs in the
order of the base.

Reference: `permute` in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from collections.abc import Callable
from dataclasses import replace

from graft.adapters.factors import HALVES, INTERLEAVED, Adapter
from graft.adapters.methods import METHODS
from graft.errors import InputError

import mlx.core as mx

Heads = Callable[[str], int | None]


def interleave(array: mx.array, heads: int) -> mx.array:
    """From halves to interleaved, along the last axis of (..., heads * head_dims)."""
    return array.reshape(*array.shape[:-1], heads, 2, -1).swapaxes(-1, -2).reshape(array.shape)


def to_halves(array: mx.array, heads: int) -> mx.array:
    """From interleaved to halves, along the last axis of (..., heads * head_dims)."""
    return array.reshape(*array.shape[:-1], heads, -1, 2).swapaxes(-1, -2).reshape(array.shape)


MOVES = {INTERLEAVED: interleave, HALVES: to_halves}


def reordered(adapter: Adapter, rotary: str, heads: Heads) -> Adapter:
    """The adapter with the rows of q and k in another order.

    Args:
        adapter: in a known order.
        rotary: the order wanted.
        heads: from a layer's path to its number of heads, `None` for all but q and k.

    Raises:
        InputError: layers that cannot be reordered, named.
    """
    if adapter.rotary in (None, rotary):
        return replace(adapter, rotary=rotary)
    tensors, refused = dict(adapter.tensors), []
    for path, setting in adapter.layers.items():
        count = heads(path)
        if count is None:
            continue
        method = METHODS[setting.method]
        if setting.parts is not None or not (method.low_rank or method.has_magnitude):
            refused.append(f"{path} ({setting.method})")
            continue
        for name in (f"{path}.lora_b", f"{path}.m"):
            if name in tensors:
                if tensors[name].shape[-1] % (2 * count):
                    refused.append(f"{name} of {tensors[name].shape[-1]} outputs, {count} heads")
                    continue
                tensors[name] = MOVES[rotary](tensors[name], count)
    if refused:
        raise InputError(f"the rows of these layers cannot be reordered: {', '.join(refused)}")
    return replace(adapter, tensors=tensors, rotary=rotary)
