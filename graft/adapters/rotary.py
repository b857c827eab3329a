"""The two row orders of q and k for rotary embeddings, and the conversion between them.

transformers rotates the first half of a head against the second ("halves"); Meta's checkpoints and
llama.cpp's files rotate neighbors against each other ("interleaved"). The outputs of an update of q
or k are in the order of its base model.

Reference: `permute` in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from graft.pretrained.architectures import HALVES, INTERLEAVED

import mlx.core as mx


def interleave(array: mx.array, heads: int) -> mx.array:
    """From halves to interleaved, along the last axis of (..., heads * head_dims)."""
    return array.reshape(*array.shape[:-1], heads, 2, -1).swapaxes(-1, -2).reshape(array.shape)


def to_halves(array: mx.array, heads: int) -> mx.array:
    """From interleaved to halves, along the last axis of (..., heads * head_dims)."""
    return array.reshape(*array.shape[:-1], heads, -1, 2).swapaxes(-1, -2).reshape(array.shape)


# From the wanted order to the function that makes it of the other one.
REORDERINGS = {INTERLEAVED: interleave, HALVES: to_halves}
