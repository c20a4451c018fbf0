"""Aria."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("aria", "aria_text"),
        router="router.weight",
        layouts=(Layout.FUSED,),
        stacked={"experts.fc1.weight": ("gate_up_proj",), "experts.fc2.weight": ("down_proj",)},
    ),
)
