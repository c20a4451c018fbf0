"""Nemotron-H: experts of two matrices, without a gate."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, UP_DOWN, ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("nemotron_h",),
        block="mixer",
        counted=(BIAS,),
        copies_share="if normalised",
        parts=UP_DOWN,
        stacked={"experts.up_proj": ("up_proj",), "experts.down_proj": ("down_proj",)},
    ),
)
