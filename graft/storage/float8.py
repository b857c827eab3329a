"""Decodes 8-bit floats, which MLX has no type for: each value is exact in a 16-bit type.

Reference: Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graft.storage.lazy_tensors import LazyTensor, StoredTensor

import mlx.core as mx

# From the type in a safetensors file to MLX's type that holds its values, and the decoding.
_KINDS: dict[str, tuple[mx.Dtype, Callable[[mx.array], mx.array]]] = {
    "F8_E4M3": (mx.bfloat16, lambda codes: mx.from_fp8(codes, dtype=mx.bfloat16)),
    # The upper half of a float16.
    "F8_E5M2": (mx.float16, lambda codes: (codes.astype(mx.uint16) << 8).view(mx.float16)),
}
# The ends of the names of scales that belong to a tensor whose name ends in "weight".
_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True)
class Float8Tensor:
    """A tensor of 8-bit floats in a file, read as 16-bit ones.

    Attributes:
        stored: the tensor as bytes.
        kind: its type in the file.
    """

    stored: StoredTensor
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self.stored.shape

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the elements."""
        return _KINDS[self.kind][0]

    def rows(self, start: int, stop: int) -> mx.array:
        """Indices start to stop - 1 of the first dimension."""
        return self.decoded(self.stored.rows(start, stop))

    def decoded(self, codes: mx.array) -> mx.array:
        """The values of bytes of this tensor."""
        return _KINDS[self.kind][1](codes)


def with_decoded_floats(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with 8-bit floats as 16-bit ones, but for those that have scales.

    Those with scales stay bytes: mlx-lm's architectures multiply the two.
    """
    return {
        name: Float8Tensor(tensor, tensor.float8)
        if isinstance(tensor, StoredTensor)
        and tensor.float8 in _KINDS
        and not any(name.removesuffix("weight") + scale in tensors for scale in _SCALES)
        else tensor
        for name, tensor in tensors.items()
    }
