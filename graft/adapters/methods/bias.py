"""BitFit: biases only.

Reference: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models" (2021), https://arxiv.org/abs/2106.10199.
"""

from graft.adapters.methods import WHOLE_KINDS, Method, register_method
from graft.adapters.methods.full import whole_formula

register_method(
    "bias",
    Method(
        formula=whole_formula("bias"),
        kinds=WHOLE_KINDS,
        text="biases only",
        targets="all-biases",
        ranked=False,
        needs_bias=True,
    ),
)
