"""Phi-3.5-MoE."""

from __future__ import annotations

from moe_fast.families.experts import mixtral_like

EXPERTS = (mixtral_like("phimoe", fused_router="router.weight", copies_share="never"),)
