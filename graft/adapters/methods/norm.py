"""Norm tuning: the weights and biases of norms only."""

from graft.adapters.methods import Method, register_method
from graft.adapters.methods.full import whole_formula

register_method(
    "norm",
    Method(
        formula=whole_formula("weight", "bias"),
        kinds=("vector",),
        text="norms only",
        targets="all-norms",
        ranked=False,
    ),
)
