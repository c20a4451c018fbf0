"""dots.llm1."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (ExpertAxis(("dots1",), counted=(BIAS,), copies_share="if normalised"),)
