"""Solar Open."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (ExpertAxis(("solar_open",), counted=(BIAS,), copies_share="if normalised"),)
