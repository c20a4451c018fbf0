"""Llama, which Mixtral and DeepSeek-MoE take, and families that are Llama by another name."""

from __future__ import annotations

from typing import Any

from moe_fast.config import Layout
from moe_fast.families.dense import DEFAULTS, QKV, DenseFamily
from moe_fast.families.experts import WHOLE, ExpertAxis

OF_LATER: dict[str, Any] = {
    **DEFAULTS,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
DENSE = (
    DenseFamily("llama", DEFAULTS, mlp_bias=True),
    DenseFamily(
        "internlm3",
        {**OF_LATER, "num_key_value_heads": 2, "pad_token_id": 2},
        mlp_bias=True,
        class_name="LlamaForCausalLM",
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    DenseFamily(
        "iquestcoder",
        {**OF_LATER, "max_position_embeddings": 131072},
        mlp_bias=True,
        class_name="LlamaForCausalLM",
    ),
    DenseFamily(
        "cwm",
        {
            **OF_LATER,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "layer_types": None,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "llama3",
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "sliding_window": 8192,
        },
        biases=(),
        mlp_bias=True,
        windows="layer_types",
        full_attention=(4, 0),
    ),
    DenseFamily(
        "helium",
        {
            **OF_LATER,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 20,
            "pad_token_id": 3,
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
        },
        bias_keys={"attention_bias": QKV},
        mlp_bias=True,
        interleaved=True,
    ),
    DenseFamily(
        "seed_oss",
        {
            **OF_LATER,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "max_position_embeddings": 524288,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-6,
        },
        bias_keys={"attention_bias": QKV, "attention_out_bias": ("o_proj",)},
        mlp_bias=True,
    ),
)
EXPERTS = (
    ExpertAxis(
        ("llama4", "llama4_text"),
        block="feed_forward",
        router="router.weight",
        layouts=(Layout.FUSED,),
        copies_share="never",  # a sigmoid each, not normalised
        stacked=WHOLE,  # transposed, [E, H, 2I] and [E, I, H]
    ),
)
