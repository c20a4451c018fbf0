"""AFMoE (Trinity)."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("afmoe",),
        router="router.gate.weight",
        counted=("expert_bias",),
    ),
)
