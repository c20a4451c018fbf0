"""ERNIE 4.5."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("ernie4_5_moe",), counted=("moe_statics.e_score_correction_bias",), copies_share="never"
    ),
)
