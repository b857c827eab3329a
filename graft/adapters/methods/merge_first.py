"""Merge-first LoRA: the update is added to the weight before the layer runs."""

from graft.adapters.methods import Method, register_method
from graft.adapters.methods.lora import LOW_RANK_FORMULA

register_method(
    "merge-first",
    Method(
        formula=LOW_RANK_FORMULA,
        kinds=("weight",),
        text="LoRA added to the weight before the layer runs",
        low_rank=True,
        merge_first=True,
    ),
)
