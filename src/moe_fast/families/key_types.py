"""The types of the values in a config.json.

transformers 5 refuses a model whose config.json has a value of another type, 0 for 0.0 among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.storage.strict_json import brief

# The types of the keys of MoE families, as transformers annotates them; families say where theirs
# differ.
TYPES: Mapping[str, str] = {
    "attention_bias": "bool",
    "attention_dropout": "float | int",
    "attention_k_eq_v": "bool",
    "attention_multiplier": "float | int | None",
    "bos_token_id": "int | None",
    "chunk_size": "int",
    "conv_L_cache": "int",
    "conv_bias": "bool",
    "conv_kernel": "int",
    "decoder_sparse_step": "int",
    "embedding_multiplier": "float | int | None",
    "enable_moe_block": "bool",
    "enable_moe_fp32_combine": "bool",
    "eod_token_id": "int | None",
    "eos_token_id": "int | list[int] | None",
    "expand": "int",
    "expert_selection_fn": "str",
    "final_logit_softcapping": "float | None",
    "first_k_dense_replace": "int",
    "head_dim": "int | None",
    "hidden_act": "str",
    "hidden_activation": "str",
    "hidden_dropout": "float | int",
    "hidden_size": "int",
    "hidden_size_per_layer_input": "int",
    "initializer_range": "float",
    "intermediate_size": "int",
    "kv_lora_rank": "int",
    "layer_norm_eps": "float",
    "layer_norm_epsilon": "float",
    "layer_types": "list[str] | None",
    "layers_block_type": "list[str] | None",
    "linear_conv_kernel_dim": "int",
    "linear_key_head_dim": "int",
    "linear_num_key_heads": "int",
    "linear_num_value_heads": "int",
    "linear_value_head_dim": "int",
    "logit_scale": "float",
    "logits_scaling": "float | int | None",
    "mamba_chunk_size": "int | None",
    "mamba_conv_bias": "bool | None",
    "mamba_d_conv": "int | None",
    "mamba_d_head": "int | str | None",
    "mamba_d_state": "int | None",
    "mamba_expand": "int | None",
    "mamba_head_dim": "int",
    "mamba_hidden_act": "str",
    "mamba_n_groups": "int | None",
    "mamba_n_heads": "int | None",
    "mamba_num_heads": "int",
    "mamba_proj_bias": "bool | None",
    "mamba_ssm_cache_dtype": "str",
    "max_position_embeddings": "int",
    "max_window_layers": "int",
    "mlp_bias": "bool",
    "mlp_hidden_act": "str",
    "mlp_layer_types": "list | None",
    "mlp_only_layers": "list[int] | None",
    "moe_intermediate_size": "int",
    "moe_k": "int | None",
    "moe_latent_size": "int | None",
    "moe_layer_end_index": "int | None",
    "moe_layer_interval": "int | None",
    "moe_layer_start_index": "int | None",
    "moe_norm_min": "float | None",
    "moe_num_experts": "int | None",
    "moe_num_shared_experts": "int | None",
    "moe_shared_expert_intermediate_size": "int",
    "moe_shared_expert_overlap": "bool",
    "moe_topk": "int | list[int]",
    "mtp_layer_types": "list[str] | None",
    "mtp_layers_block_type": "list[str] | None",
    "mtp_mlp_layer_types": "list[str] | None",
    "n_group": "int",
    "n_groups": "int",
    "n_routed_experts": "int",
    "n_shared_experts": "int",
    "norm_eps": "float",
    "norm_topk_prob": "bool",
    "num_attention_heads": "int",
    "num_dense_layers": "int",
    "num_experts": "int",
    "num_experts_per_tok": "int",
    "num_hidden_layers": "int",
    "num_key_value_heads": "int",
    "num_kv_shared_layers": "int",
    "num_local_experts": "int",
    "num_logits_to_keep": "int",
    "num_mtp_layers": "int",
    "num_nextn_predict_layers": "int",
    "num_shared_experts": "int",
    "output_router_logits": "bool",
    "pad_token_id": "int | None",
    "position_embedding_type": "str | None",
    "prefix_dense_intermediate_size": "int | None",
    "prefix_dense_sliding_window_pattern": "int",
    "pretraining_tp": "int",
    "q_lora_rank": "int | None",
    "qk_nope_head_dim": "int",
    "qk_rope_head_dim": "int",
    "qkv_bias": "bool",
    "rescale_prenorm_residual": "bool",
    "residual_in_fp32": "bool",
    "residual_multiplier": "float | int | None",
    "rms_norm_eps": "float",
    "rope_interleave": "bool | None",
    "rope_scaling": "dict | None",
    "rope_theta": "float | int",
    "routed_scaling_factor": "float",
    "router_aux_loss_coef": "float",
    "router_jitter_noise": "float",
    "router_scaling_factor": "float",
    "sep_token_id": "int | None",
    "shared_expert_combination_strategy": "str",
    "shared_expert_intermediate_size": "int",
    "shared_intermediate_size": "int",
    "sliding_window": "int | None",
    "sliding_window_pattern": "int",
    "ssm_state_size": "int",
    "tie_word_embeddings": "bool",
    "time_step_floor": "float",
    "time_step_limit": "list[float, float] | tuple[float, float] | None",
    "time_step_max": "float",
    "time_step_min": "float",
    "top_k_experts": "int | None",
    "topk_group": "int",
    "use_bias": "bool",
    "use_bidirectional_attention": "Optional",
    "use_cache": "bool",
    "use_conv_bias": "bool",
    "use_double_wide_mlp": "bool",
    "use_expert_bias": "bool",
    "use_mamba_kernels": "bool",
    "use_qk_norm": "bool",
    "use_sliding_window": "bool",
    "v_head_dim": "int | None",
    "vocab_size": "int",
    "vocab_size_per_layer_input": "int",
}
# The keys that are floats in one MoE family at least; in none are they integers.
FLOAT_KEYS = (
    *("attention_dropout", "attention_multiplier", "attention_value_scale", "attn_scale"),
    *("aux_loss_alpha", "aux_loss_coef", "clip_qkv", "embedding_multiplier"),
    *("final_logit_softcapping", "initializer_range", "input_jitter_noise", "kda_lower_bound"),
    *("layer_norm_eps", "layer_norm_epsilon", "logit_scale", "logits_scaling", "moe_norm_min"),
    *("moe_routed_scaling_factor", "moe_router_logit_softcapping", "norm_eps"),
    *("partial_rotary_factor", "residual_multiplier", "rms_norm_eps", "rope_theta"),
    *("route_scale", "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise"),
    *("router_scaling_factor", "swiglu_alpha", "swiglu_limit", "time_step_floor"),
    *("time_step_max", "time_step_min"),
)
# The same inside of `rope_parameters` and `rope_scaling`.
ROPE_KEYS = ("rope_parameters", "rope_scaling")
ROPE_FLOAT_KEYS = (
    *("attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor"),
    *("long_factor", "low_freq_factor", "mscale", "mscale_all_dim", "partial_rotary_factor"),
    *("rope_theta", "short_factor"),
)


LIST = re.compile(r"list\[([^\]]*)\]")


def with_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration; integers become floats under the keys that are floats."""
    found = {key: as_float(value) if key in FLOAT_KEYS else value for key, value in config.items()}
    for key in ROPE_KEYS:
        if isinstance(found.get(key), dict):
            found[key] = {
                name: as_float(value) if name in ROPE_FLOAT_KEYS else value
                for name, value in found[key].items()
            }
    return found


def as_float(value: Any) -> Any:
    if isinstance(value, list):
        return [as_float(item) for item in value]
    return float(value) if type(value) is int else value


def find_wrong_types(config: Mapping[str, Any], types: Mapping[str, str]) -> Iterator[str]:
    """The keys of `config` whose values have another type than `types` says."""
    for key, expected in types.items():
        if key in config and not has_type(config[key], expected):
            yield f"takes {expected} for {key}, config.json has {brief(config[key])}"


def has_type(value: Any, expected: str) -> bool:
    """Whether a value of JSON has one of the types of an annotation such as `"int | None"`."""
    if expected == "Optional":  # of one of some words
        return value is None or isinstance(value, str)
    others = LIST.sub("", expected).split(" | ")
    if isinstance(value, list) and "list" not in others:
        found = [type_name(item) for item in value]
        # Of so many items, each with its type; or of any number with one of some types.
        fixed = [inner.split(", ") for inner in LIST.findall(expected) if ", " in inner]
        free = [set(inner.split(" | ")) for inner in LIST.findall(expected) if ", " not in inner]
        return found in fixed or any(set(found) <= items for items in free)
    return type_name(value) in others


def type_name(value: Any) -> str:
    """As annotations have it; transformers writes infinity as `{"__float__": "Infinity"}`."""
    if value is None:
        return "None"
    return "float" if isinstance(value, dict) and "__float__" in value else type(value).__name__
