"""What readers other than transformers are asked to compute: outputs of every family.

The models have heads of 32: vLLM's attention wants them. Pairs beyond a chosen dozen or two are
asked where MOE_FAST_ALL_READERS is set, as `make readers` does: to 1, or to words with commas
between, of which a pair's name must have one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from folders import config_of
from forward import Model
from logits import compute_logits, log_softmax
from moe_fast import check_moe
from moe_fast.families.rules import Reader

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
HEADS = {"head_dim": 32}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CONVOLUTIONS: dict[str, Any] = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}
MAMBA = {
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 4,
    "mamba_d_state": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
# As Ministral 3 has it.
GROWING = {
    "rope_theta": 1e4,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
DELTA = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "num_hidden_layers": 4,
    "head_dim": 32,
    "ssm_state_size": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "n_groups": 1,
}
GEMMA = {
    "head_dim": 32,
    "global_head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 7,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": True,
    # llama.cpp looks GELU up in a table of half precision: small numbers keep that small.
    "final_logit_softcapping": 30.0,
    "initializer_range": 0.05,
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "olmo2, biases": ("olmo2", {"attention_bias": True}),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 8.0}),
    "phi3": ("phi3", {}),
    "granite swa": (
        "granite_swa",
        {"sliding_window": 7, "layer_types": SLIDING, "attention_multiplier": 0.2},
    ),
    "lfm2": ("lfm2", CONVOLUTIONS),
    "granite hybrid": ("granitemoehybrid", MAMBA),
}
OF_ALL_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone": ("exaone", {}),
    "helium": ("helium", HEADS),
    "ernie": ("ernie4_5", HEADS),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7},
    ),
    "olmo3": ("olmo3", {}),
    "lfm2, untied": ("lfm2", {**CONVOLUTIONS, "tie_word_embeddings": False}),
    "granite hybrid, rope": ("granitemoehybrid", {**MAMBA, "position_embedding_type": "rope"}),
    "hunyuan": ("hunyuan_v1_dense", HEADS),
    "cohere2": (
        "cohere2",
        {
            "sliding_window": 7,
            "layer_types": SLIDING,
            "tie_word_embeddings": True,
            "logit_scale": 1.0,
        },
    ),
    "youtu": ("youtu", LATENT),
    "qwen3, window": (
        "qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING},
    ),
    "qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, heads alike": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    "qwen3, windows": (
        "qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention"] * 3,
        },
    ),
    "granite hybrid, attention alone": (
        "granitemoehybrid",
        {**MAMBA, "layer_types": ["attention"] * 3},
    ),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h, short steps": ("nemotron_h", {**NEMOTRON, "time_step_min": 1e-9}),
    "gemma4": ("gemma4_text", GEMMA),
    "gemma": ("gemma", {**HEADS, "tie_word_embeddings": True}),
    "hyperclovax": ("hyperclovax", {"use_post_norm": False, "logits_scaling": 0.125}),
    "glm": ("glm", HEADS),
    "ministral3": ("ministral3", {**HEADS, "rope_parameters": GROWING}),
}
FUSED, SHARED = {"layout": "fused"}, {"shared_experts": True}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", FUSED),
    ("llama", "qwen2_moe", SHARED),
    ("llama", "granitemoeshared", SHARED),
    ("llama", "deepseek", {}),
    ("llama", "deepseek", SHARED),
    ("llama, biases", "granitemoe", {}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", FUSED),
    ("qwen2", "qwen2_moe", {"dense_layers": (0, 2)}),
    ("qwen3", "qwen3_moe", {}),
    ("qwen3", "qwen3_moe", FUSED),
    ("qwen3, biases", "qwen3_moe", {}),
    ("olmo2, biases", "flex_olmo", {}),
    ("olmo2, biases", "flex_olmo", FUSED),
    ("granite", "granitemoe", {}),
    ("phi3", "mixtral", {}),
    ("granite swa", "granitemoe_swa", {}),
    ("lfm2", "lfm2_moe", {}),
    ("granite hybrid", "granitemoehybrid", {}),
]
WANTED = os.environ.get("MOE_FAST_ALL_READERS", "")
if WANTED:
    SOURCES |= OF_ALL_READERS
    CASES += [
        ("exaone", "mixtral", {}),
        ("helium", "mixtral", {}),
        ("ernie", "mixtral", {}),
        ("mistral, window", "granitemoe_swa", {}),
        ("smollm3", "granitemoe_swa", {}),
        ("smollm3, window", "granitemoe_swa", {}),
        ("olmo3", "flex_olmo", {}),
        ("lfm2, untied", "lfm2_moe", {}),
        ("granite hybrid, rope", "granitemoehybrid", {}),
        ("hunyuan", "hunyuan_v1_moe", {}),
        ("cohere2", "cohere2_moe", {}),
        ("youtu", "deepseek_v3", {}),
        ("youtu", "glm4_moe_lite", {}),
        ("ernie", "ernie4_5_moe", {}),
        ("ernie", "ernie4_5_moe", {"dense_layers": (2,)}),
        ("llama", "ernie4_5_moe", SHARED),
        ("llama", "solar_open", {}),
        ("qwen2", "solar_open", {}),
        ("llama", "glm4_moe", {}),
        ("qwen3", "glm4_moe", SHARED),
        ("glm", "glm4_moe", {}),
        ("qwen3", "dots1", {}),
        ("qwen3, window", "dots1", {}),
        ("qwen3, heads alike", "dots1", {}),
        ("qwen3", "hy_v3", {}),
        ("qwen3, biases", "hy_v3", {}),
        ("qwen3", "mellum", {}),
        ("qwen3, window", "mellum", {}),
        ("qwen3, tied", "mellum", {}),
        ("qwen3, biases", "mellum", {}),
        ("qwen3", "mellum", {"dense_layers": (0,)}),
        ("qwen3", "exaone_moe", {}),
        ("qwen3, windows", "exaone_moe", SHARED | {"dense_layers": (0,)}),
        ("qwen3, tied", "exaone_moe", {"dense_layers": (1,)}),
        ("llama", "granitemoehybrid", {}),
        ("llama, biases", "granitemoehybrid", SHARED),
        ("granite hybrid, attention alone", "granitemoehybrid", {}),
        ("qwen3_5", "qwen3_5_moe_text", {}),
        ("nemotron_h", "nemotron_h", {}),
        ("nemotron_h", "nemotron_h", {"dense_layers": (1,)}),
        ("nemotron_h, short steps", "nemotron_h", {}),
        ("gemma4", "gemma4_text", {}),
        ("gemma", "granitemoe", {}),
        ("hyperclovax", "granitemoe", {}),
        ("ministral3", "mixtral", {}),
    ]


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    source, target, options = case
    return f"{source} to {target}, {' '.join(options)}"


if WANTED not in ("", "1"):
    CASES = [case for case in CASES if any(word in name_of(case) for word in WANTED.split(","))]


def reader_of(folder: Path, name: str) -> Reader:
    """What the check says of a reader."""
    (reader,) = (reader for reader in check_moe(folder).readers if reader.name == name)
    return reader


def expected_of(folder: Path, tokens: list[int]) -> np.ndarray:
    """Log-probabilities `[T, vocab]`: by the twin for DeepSeek, else by transformers."""
    if config_of(folder)["model_type"] == "deepseek":
        return log_softmax(Model(folder).logits(np.array(tokens)))
    logits, problems = compute_logits(folder, tokens)
    assert not problems
    return log_softmax(logits)
