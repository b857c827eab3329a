"""rsLoRA: LoRA scaled by alpha / sqrt(rank).

Reference: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023),
https://arxiv.org/abs/2312.03732.
"""

from graft.adapters.methods import LOW_RANK_KINDS, Method, register_method
from graft.adapters.methods.lora import LOW_RANK_FORMULA

register_method(
    "rslora",
    Method(
        formula=LOW_RANK_FORMULA,
        kinds=LOW_RANK_KINDS,
        text="LoRA scaled by alpha / sqrt(rank)",
        rank_stabilized=True,
        low_rank=True,
    ),
)
