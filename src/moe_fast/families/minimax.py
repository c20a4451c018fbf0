"""MiniMax."""

from __future__ import annotations

from moe_fast.families.experts import mixtral_like

EXPERTS = (
    mixtral_like("minimax"),
    mixtral_like("minimax_m2", counted=("e_score_correction_bias",)),
)
