"""Jamba."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (ExpertAxis(("jamba",), block="feed_forward", router="router.weight"),)
