"""Kimi."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis, mixtral_like

EXPERTS = (
    ExpertAxis(("kimi_k2",), counted=(BIAS,)),
    mixtral_like("kimi_linear", counted=(BIAS,)),
)
