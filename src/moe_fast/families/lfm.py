"""LFM2 with experts."""

from __future__ import annotations

from moe_fast.families.experts import W1_W3_W2, ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("lfm2_moe",),
        block="feed_forward",
        counted=("expert_bias",),
        copies_share="if normalised",
        parts=W1_W3_W2,
    ),
)
