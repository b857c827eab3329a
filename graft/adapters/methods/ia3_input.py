"""(IA)3 on the input: one trained factor per input, for a feed-forward block's second matrix."""

from graft.adapters.methods import Method, register_method
from graft.adapters.methods.ia3 import ia3_formula

register_method(
    "ia3-input",
    Method(
        formula=ia3_formula(scales_input=True),
        kinds=("linear", "conv"),
        text="one trained factor per input",
        targets="down_proj",
        ranked=False,
    ),
)
