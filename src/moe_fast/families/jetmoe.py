"""JetMoE."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.experts import GRANITE_STACKED, ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("jetmoe",),
        router="router.layer.weight",
        layouts=(Layout.FUSED,),
        stacked=GRANITE_STACKED,
        obstacle="its attention has experts too, and one key of config.json counts both",
    ),
)
