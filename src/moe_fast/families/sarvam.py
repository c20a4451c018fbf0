"""Sarvam."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (
    ExpertAxis(("sarvam_moe",), counted=("gate.expert_bias",), copies_share="if normalised"),
    ExpertAxis(("sarvam_mla",), counted=(BIAS,), copies_share="if normalised"),
)
