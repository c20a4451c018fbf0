"""gpt-oss: matrices transposed, gate and up in turn, MXFP4 as blocks and scales."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.experts import WHOLE, ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("gpt_oss",),
        router="router.weight",
        counted=("router.bias",),
        layouts=(Layout.FUSED,),
        stacked=WHOLE,
    ),
)
