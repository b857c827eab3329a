"""Graft: LoRA fine-tuning on MLX."""

from graft import _checkout
from graft.runtime import blas

__version__ = "0.1.0"

_checkout.install()
blas.load()
