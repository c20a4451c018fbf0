"""Mellum."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (ExpertAxis(("mellum",)),)
