"""Ling and Ring (Bailing)."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("bailing_moe", "bailing_moe_v2", "bailing_hybrid"),
        counted=("gate.expert_bias",),
        copies_share="if normalised",
    ),
)
