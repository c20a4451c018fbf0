"""Hunyuan."""

from __future__ import annotations

from moe_fast.families.experts import ExpertAxis

EXPERTS = (
    ExpertAxis(("hunyuan_v1_moe",), router="gate.wg.weight"),
    ExpertAxis(("hy_v3",), router="router.gate.weight", counted=("expert_bias",)),
)
