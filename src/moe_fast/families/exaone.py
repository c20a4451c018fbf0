"""EXAONE with experts."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(("exaone_moe",), counted=("e_score_correction_bias",), copies_share="if normalised"),
)
