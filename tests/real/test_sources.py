"""Every dense family with names or tensors of its own, in targets that it fits, by transformers.

Norms and biases are random, and the sizes as small as the families allow.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from dense_families import FAMILIES
from dense_models import written
from families import LLAMA3, YARN
from folders import config_of
from logits import PROBLEMS, assert_same, compute_logits
from moe_fast import MoeConfig, build_moe, check_moe
from random_models import SIZES, save_random_model

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
TOKENS = np.random.default_rng(0).integers(96, size=40).tolist()
THETA = {"rope_theta": 1e4}
HEADS = {"head_dim": 20}
WHOLE = {"head_dim": 12}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
PARTIAL = {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", **THETA}}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
# As Ministral 3 has it: scaled for a context that its queries, which grow, reach beyond.
GROWING = {
    **THETA,
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 48,
    "max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CONVOLUTIONS = ["conv", "full_attention", "conv"]
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
MAMBA = {
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
}
GEMMA = {
    "head_dim": 12,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 7,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "tie_word_embeddings": True,
}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    "num_hidden_layers": 5,
    "head_dim": 20,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
# The dense family, what is special about its configuration, the targets that it fits.
SOURCES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "exaone": ("exaone", {}, ("mixtral", "qwen2_moe", "glm4_moe")),
    "exaone, tied, llama3 rope": (
        "exaone",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | THETA},
        ("mixtral", "granitemoe"),
    ),
    "internlm3": ("internlm3", HEADS, ("mixtral", "glm4_moe")),
    "iquestcoder": ("iquestcoder", WHOLE, ("mixtral", "granitemoeshared")),
    "cwm, wide window": ("cwm", HEADS, ("mixtral", "glm4_moe")),
    "cwm, window": (
        "cwm",
        {**WHOLE, "sliding_window": 7, "layer_types": SLIDING, "rope_parameters": LLAMA3 | THETA},
        ("granitemoe_swa",),
    ),
    "helium": ("helium", WHOLE, ("mixtral", "qwen2_moe", "glm4_moe")),
    "helium, yarn, tied": (
        "helium",
        {**WHOLE, "tie_word_embeddings": True, "rope_parameters": YARN | THETA},
        ("mixtral",),
    ),
    "seed_oss": ("seed_oss", HEADS, ("glm4_moe",)),
    "seed_oss, heads as usual": ("seed_oss", WHOLE, ("qwen2_moe", "glm4_moe")),
    "seed_oss, all biases": (
        "seed_oss",
        {**WHOLE, "attention_out_bias": True},
        ("granitemoe", "granitemoe_swa"),
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}, ("granitemoe_swa",)),
    "smollm3, window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7},
        ("granitemoe_swa",),
    ),
    "smollm3, rotated": ("smollm3", {"no_rope_layers": [1, 1, 1]}, ("mixtral", "glm4_moe")),
    "phi3": ("phi3", {}, ("mixtral", "qwen2_moe", "glm4_moe")),
    "phi3, window": ("phi3", {"sliding_window": 7}, ("mixtral",)),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE}, ("mixtral",)),
    "phi3, partly rotated, tied": (
        "phi3",
        {**PARTIAL, "tie_word_embeddings": True},
        ("glm4_moe",),
    ),
    "glm": ("glm", HEADS, ("glm4_moe",)),
    "glm, no biases": ("glm", {"head_dim": 16, "attention_bias": False}, ("glm4_moe",)),
    "ernie4_5": ("ernie4_5", HEADS, ("mixtral", "glm4_moe", "ernie4_5_moe")),
    "ernie4_5, untied": (
        "ernie4_5",
        {**WHOLE, "tie_word_embeddings": False},
        ("granitemoe", "ernie4_5_moe"),
    ),
    "llama, its heads' own size": (
        "llama",
        HEADS,
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "ernie4_5_moe", "solar_open"),
    ),
    "mistral, llama3 rope, tied": (
        "mistral",
        {"sliding_window": None, "tie_word_embeddings": True, "rope_parameters": LLAMA3 | THETA},
        ("ernie4_5_moe", "solar_open"),
    ),
    "hyperclovax": (
        "hyperclovax",
        {
            "use_post_norm": False,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.125,
        },
        ("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid"),
    ),
    "hyperclovax, biases, tied": (
        "hyperclovax",
        {"use_post_norm": False, "attention_bias": True, "tie_word_embeddings": True},
        ("granitemoe",),
    ),
    "gemma": ("gemma", {**WHOLE, "tie_word_embeddings": True}, ("granitemoe", "granitemoe_swa")),
    "gemma, heads of their own size, biases": (
        "gemma",
        {**HEADS, "attention_bias": True},
        ("granitemoe", "granitemoe_swa"),
    ),
    "vaultgemma": ("vaultgemma", {**WHOLE, **NO_CAPS, "sliding_window": 128}, ("granitemoe",)),
    "vaultgemma, window": (
        "vaultgemma",
        {**WHOLE, **NO_CAPS, "query_pre_attn_scalar": 20, "sliding_window": 7},
        ("granitemoe_swa",),
    ),
    "ministral": ("ministral", {**HEADS, "sliding_window": 7}, ("mixtral",)),
    "ministral, window in some layers": (
        "ministral",
        {**WHOLE, "sliding_window": 7, "layer_types": SLIDING},
        ("granitemoe_swa",),
    ),
    "ministral3": ("ministral3", {**HEADS, "rope_parameters": GROWING}, ("mixtral", "glm4_moe")),
    "ministral3, window, tied": (
        "ministral3",
        {
            **WHOLE,
            "sliding_window": 7,
            "tie_word_embeddings": True,
            "rope_parameters": GROWING | {"llama_4_scaling_beta": 0.0},
        },
        ("mixtral",),
    ),
    "olmo3": ("olmo3", {}, ("flex_olmo",)),
    "qwen3": ("qwen3", HEADS, ("glm4_moe", "dots1", "hy_v3", "mellum", "exaone_moe")),
    "qwen3, window in all layers, tied": (
        "qwen3",
        {
            **WHOLE,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention"] * 3,
        },
        ("exaone_moe",),
    ),
    "qwen3, biases, tied, yarn": (
        "qwen3",
        {
            **WHOLE,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | THETA,
        },
        ("dots1", "hy_v3", "mellum"),
    ),
    "qwen3, window in some layers": (
        "qwen3",
        {
            **HEADS,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": SLIDING,
        },
        ("dots1", "mellum"),
    ),
    "qwen2": ("qwen2", {}, ("glm4_moe", "solar_open")),
    "mistral, partly": ("mistral", {"sliding_window": 7}, ("granitemoe_swa",)),
    "lfm2": ("lfm2", {"layer_types": CONVOLUTIONS, "norm_eps": 1e-5}, ("lfm2_moe",)),
    "lfm2, width as given, biases, untied": (
        "lfm2",
        {
            "layer_types": CONVOLUTIONS,
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
            "tie_word_embeddings": False,
        },
        ("lfm2_moe",),
    ),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 12}, ("hunyuan_v1_moe",)),
    "hunyuan, head_dim, biases, tied": (
        "hunyuan_v1_dense",
        {**HEADS, "attention_bias": True, "tie_word_embeddings": True},
        ("hunyuan_v1_moe",),
    ),
    "cohere2": ("cohere2", {"sliding_window": 7, "layer_types": SLIDING}, ("cohere2_moe",)),
    "cohere2, biases, untied": (
        "cohere2",
        {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 4},
        ("cohere2_moe",),
    ),
    "qwen3_5": ("qwen3_5_text", {**DELTA, "head_dim": 16}, ("qwen3_5_moe_text",)),
    "qwen3_5, biases, tied": (
        "qwen3_5_text",
        {**DELTA, "head_dim": 20, "attention_bias": True, "tie_word_embeddings": True},
        ("qwen3_5_moe_text",),
    ),
    "granite hybrid": ("granitemoehybrid", MAMBA, ("granitemoehybrid",)),
    "granite hybrid, biases, rope": (
        "granitemoehybrid",
        {
            **MAMBA,
            "attention_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        ("granitemoehybrid",),
    ),
    "youtu": ("youtu", LATENT, ("deepseek_v3", "glm4_moe_lite")),
    "youtu, plain queries, biases, untied": (
        "youtu",
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": False},
        ("deepseek_v3", "glm4_moe_lite"),
    ),
    "gemma4": ("gemma4_text", GEMMA, ("gemma4_text",)),
    "gemma4, no embedding of layers": (
        "gemma4_text",
        {**GEMMA, "hidden_size_per_layer_input": 0},
        ("gemma4_text",),
    ),
    "gemma4, keys are values, shared, untied": (
        "gemma4_text",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
        ("gemma4_text",),
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON, ("nemotron_h",)),
    "nemotron_h, biases": (
        "nemotron_h",
        {
            **NEMOTRON,
            "layers_block_type": ["mlp", "attention", "mamba", "mlp"],
            "num_hidden_layers": 4,
            "use_bias": True,
            "use_conv_bias": False,
            "n_groups": 1,
        },
        ("nemotron_h",),
    ),
    "granite_swa": (
        "granite_swa",
        {
            "sliding_window": 7,
            "layer_types": SLIDING,
            "layer_rope_theta": [1e4, 0, 5e5],
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        ("granitemoe_swa",),
    ),
}
CASES = [
    pytest.param(source, target, id=f"{source} to {target}")
    for source, (_, _, targets) in SOURCES.items()
    for target in targets
]


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """The folder of a source and its logits, made once."""
    made = {}

    def make(source: str) -> tuple[Path, np.ndarray]:
        if source not in made:
            family, changes, _ = SOURCES[source]
            folder = tmp_path_factory.mktemp("dense") / "model"
            save_random_model(folder, family, **changes)
            logits, problems = compute_logits(folder, TOKENS)
            assert not problems
            made[source] = folder, logits
        return made[source]

    return make


@pytest.mark.parametrize(("source", "target"), CASES)
def test_it_loads_whole_and_computes_the_same(dense, tmp_path, source, target):
    folder, expected = dense(source)
    build_moe(folder, tmp_path / "moe", CONFIG, target=target)
    logits, problems = compute_logits(tmp_path / "moe", TOKENS)
    assert not problems
    assert_same(logits, expected, 2e-4)
    findings = {each.check: each for each in check_moe(tmp_path / "moe").findings}
    assert {check: f for check, f in findings.items() if f.status == "failed"} == {}


# One of each kind of stacked experts among the families that are tested here alone.
FUSED = [
    ("nemotron_h", "nemotron_h"),
    ("ernie4_5", "ernie4_5_moe"),
    ("qwen3", "hy_v3"),
    ("qwen3", "mellum"),
    ("qwen3", "exaone_moe"),
]


@pytest.mark.parametrize(("source", "target"), FUSED)
def test_stacked_experts_too(dense, tmp_path, source, target):
    folder, expected = dense(source)
    build_moe(folder, tmp_path / "moe", CONFIG, target=target, layout="fused")
    logits, problems = compute_logits(tmp_path / "moe", TOKENS)
    assert not problems
    assert_same(logits, expected, 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_keys_are_those_that_transformers_writes(family):
    """The golden file of the ordinary tests, as the installed version would make it."""
    assert written(family) == FAMILIES[family]


VISION = {"hidden_size": 32, "intermediate_size": 40}
HEADS_OF_VISION = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qwen3_5": (
        {**DELTA, "head_dim": 16},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16},
        "qwen3_5_moe",
    ),
    "gemma4": (
        {**GEMMA, "pad_token_id": 0},
        {**HEADS_OF_VISION, "num_hidden_layers": 1, "position_embedding_size": 16},
        "gemma4",
    ),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
        {
            "model_type": "pixtral",
            **HEADS_OF_VISION,
            "num_hidden_layers": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        "mixtral",
    ),
}


def likely(folder: Path) -> np.ndarray:
    """The logits of a multimodal model for a text alone; every tensor is there and used."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in PROBLEMS)
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("outer", WRAPPERS)
def test_language_models_inside_of_others(tmp_path, outer):
    text, vision, model_type = WRAPPERS[outer]
    torch.manual_seed(0)
    keys = {**SIZES, "initializer_range": 0.2, **text}
    config = AutoConfig.for_model(outer, text_config=keys, vision_config={**VISION, **vision})
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "dense")
    expected = likely(tmp_path / "dense")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert config_of(tmp_path / "moe")["model_type"] == model_type
    if model_type == "mixtral":
        logits, problems = compute_logits(tmp_path / "moe", TOKENS)
        assert not problems
    else:
        logits = likely(tmp_path / "moe")
    assert_same(logits, expected, 2e-4)


# Of what transformers 4 knows, one of each kind.
TRANSFORMERS_4 = {
    "helium": "mixtral",
    "phi3, partly rotated, tied": "glm4_moe",
    "glm": "glm4_moe",
    "hunyuan": "hunyuan_v1_moe",
    "granite hybrid": "granitemoehybrid",
    "hyperclovax": "granitemoehybrid",
    "youtu": "deepseek_v3",
    "ernie4_5": "ernie4_5_moe",
    "qwen3": "dots1",
}


def test_transformers_4_computes_the_same(dense, tmp_path):
    python = os.environ.get("MOE_FAST_TRANSFORMERS4")
    assert python, "MOE_FAST_TRANSFORMERS4 must name a Python with torch and transformers 4"
    for i, (source, target) in enumerate(TRANSFORMERS_4.items()):
        build_moe(dense(source)[0], tmp_path / str(i), CONFIG, target=target)
    jobs = [[str(tmp_path / str(i)), TOKENS] for i in range(len(TRANSFORMERS_4))]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("logits.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, script, tmp_path / "jobs.json", tmp_path / "logits.npz"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "logits.npz") as file:
        assert str(file["version"]).startswith("4.")
        for i, source in enumerate(TRANSFORMERS_4):
            assert file[f"problems{i}"].tolist() == [], source
            assert_same(file[f"logits{i}"], dense(source)[1], 2e-4)
