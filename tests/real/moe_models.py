"""Tiny random MoEs of every family that transformers has and we have rules for.

`python tests/real/moe_models.py FILE` writes what `save_pretrained` makes of each: its config.json
and the shape of every tensor, one family a line (tests/golden/moe_families.jsonl).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_EXPERTS, TOP_K = 6, 2
# Of these, each configuration gets the keys that it has.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
        TOP_K,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "initializer_range": 0.2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
ATTENTION = ["full_attention"] * 3
LATENT = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT,
    "bailing_hybrid": {},
    "beam": {},
    "cohere2_moe": {},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "n_group": None, "topk_group": None},
    "deepseek_v3": LATENT,
    "dots1": {"layer_types": ATTENTION},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 96,
        "layer_types": ATTENTION,
    },
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "gpt_oss": {"layer_types": ATTENTION},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["attention"] * 3, "mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {},
    "laguna": {},
    "lara_mini": {},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ATTENTION},
    "llama4_text": {"intermediate_size_mlp": 40, "moe_layers": [1, 2], "attention_chunk_size": 32},
    "longcat_flash": {
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_layers": 2,
    },
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {"layer_types": ATTENTION},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["attention", "moe", "mlp"],
        "moe_shared_expert_intermediate_size": 40,
        "use_mamba_kernels": False,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": ATTENTION},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ATTENTION},
    "sarvam_mla": LATENT,
    "sarvam_moe": {},
    "solar_open": {},
}


def random_moe(family: str, **changes: Any) -> Any:
    """A float32 model as transformers starts it, the same each time; biases of routers random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = {*kind().to_dict(), *kind.attribute_map}
    keys = {key: value for key, value in SIZES.items() if key in known}
    if "mlp_layer_types" in known:
        keys["mlp_layer_types"] = ["dense", "sparse", "sparse"]
        keys.pop("first_k_dense_replace", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **keys | OWN[family] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name or NUM_EXPERTS in tensor.shape[-1:]:
                tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


def save_random_moe(folder: Path, family: str, **changes: Any) -> Any:
    """Write such a model to a folder; return it."""
    model = random_moe(family, **changes)
    model.save_pretrained(folder)
    return model


def written(family: str) -> dict[str, Any]:
    """What `save_pretrained` writes of a family."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        save_random_moe(Path(folder), family)
        config = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {"family": family, "config": config, "tensors": shapes}


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as output:
        for each in OWN:
            output.write(json.dumps(written(each)) + "\n")
