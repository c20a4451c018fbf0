"""Beam."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (ExpertAxis(("beam",), counted=(BIAS,), copies_share="if normalised"),)
