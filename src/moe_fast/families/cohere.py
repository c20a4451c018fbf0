"""Cohere2 with experts."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (ExpertAxis(("cohere2_moe",)),)
