"""Llama, which Mixtral and DeepSeek-MoE take."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.dense import DEFAULTS, DenseFamily
from moe_fast.families.experts import WHOLE, ExpertAxis

DENSE = (DenseFamily("llama", DEFAULTS, mlp_bias=True),)
EXPERTS = (
    ExpertAxis(
        ("llama4", "llama4_text"),
        block="feed_forward",
        router="router.weight",
        layouts=(Layout.FUSED,),
        copies_share="never",  # a sigmoid each, not normalised
        stacked=WHOLE,  # transposed, [E, H, 2I] and [E, I, H]
    ),
)
