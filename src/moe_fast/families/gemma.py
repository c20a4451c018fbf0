"""Gemma 4 with experts, which stand beside the dense FFN of each layer."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("gemma4", "gemma4_text"),
        block="",
        router="router.proj.weight",
        counted=("router.per_expert_scale",),
        layouts=(Layout.FUSED,),
    ),
)
