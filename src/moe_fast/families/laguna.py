"""Laguna."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (ExpertAxis(("laguna",), counted=("experts.e_score_correction_bias",)),)
