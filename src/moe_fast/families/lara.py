"""Lara."""

from __future__ import annotations

from moe_fast.config import Layout
from moe_fast.families.experts import ExpertAxis

EXPERTS = (ExpertAxis(("lara_mini",), layouts=(Layout.FUSED,)),)
