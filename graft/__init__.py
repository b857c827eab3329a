"""Graft: LoRA fine-tuning on MLX."""

from graft.runtime import blas

__version__ = "0.1.0"

blas.load()
