"""Llama, which Mixtral and DeepSeek-MoE take."""

from __future__ import annotations

from moe_fast.families.dense import DEFAULTS, DenseFamily

DENSE = (DenseFamily("llama", DEFAULTS, mlp_bias=True),)
