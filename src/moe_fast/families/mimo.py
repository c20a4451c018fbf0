"""MiMo V2 Flash."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (ExpertAxis(("mimo_v2_flash",), counted=(BIAS,), copies_share="if normalised"),)
