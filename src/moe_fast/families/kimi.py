"""Kimi."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis, mixtral_like

EXPERTS = (
    ExpertAxis(("kimi_k2",), counted=(BIAS,), copies_share="if normalised"),
    mixtral_like("kimi_linear", counted=(BIAS,), copies_share="if normalised"),
)
