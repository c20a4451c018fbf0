"""LongCat Flash."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("longcat_flash",),
        router="router.classifier.weight",
        counted=("router.e_score_correction_bias",),
        obstacle="its router also chooses among experts that have no weights",
    ),
)
