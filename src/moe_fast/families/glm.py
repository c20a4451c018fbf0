"""GLM-4.5 and later."""

from __future__ import annotations

from moe_fast.families.experts import BIAS, ExpertAxis

EXPERTS = (
    ExpertAxis(
        ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "glm4v_moe_text"),
        counted=(BIAS,),
        copies_share="if normalised",
    ),
)
