"""EXAONE 3.5, and EXAONE with experts."""

from __future__ import annotations

from moe_fast.families.dense import DEFAULTS, DenseFamily
from moe_fast.families.experts import ExpertAxis

DENSE = (
    DenseFamily(
        "exaone",
        {
            **DEFAULTS,
            "eos_token_id": 361,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
        },
        mlp_bias=True,
        class_name="LlamaForCausalLM",
        aliases={
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
            "num_layers": "num_hidden_layers",
        },
        names=(
            ("model.embed_tokens.", "transformer.wte."),
            ("model.norm.", "transformer.ln_f."),
            ("model.layers.", "transformer.h."),
            (".self_attn.o_proj.", ".attn.attention.out_proj."),
            (".self_attn.", ".attn.attention."),
            (".mlp.gate_proj.", ".mlp.c_fc_0."),
            (".mlp.up_proj.", ".mlp.c_fc_1."),
            (".mlp.down_proj.", ".mlp.c_proj."),
            (".input_layernorm.", ".ln_1."),
            (".post_attention_layernorm.", ".ln_2."),
        ),
    ),
)
EXPERTS = (
    ExpertAxis(("exaone_moe",), counted=("e_score_correction_bias",), copies_share="if normalised"),
)
