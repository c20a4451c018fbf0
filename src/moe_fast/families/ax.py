"""A.X K1 and K2."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (ExpertAxis(("axk1", "axk2"), counted=(BIAS,), copies_share="if normalised"),)
