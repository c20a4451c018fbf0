"""Tiny dense models of the families with names or tensors of their own, as transformers makes them.

`python tests/real/dense_models.py FILE` writes what `save_pretrained` makes of each: its
config.json and the shape of every tensor, one family a line (tests/golden/dense_families.jsonl).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from random_models import save_random_model

HEADS = {"head_dim": 12}
# What each family's smallest model needs besides the sizes of all.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "cwm": HEADS,
    "ernie4_5": HEADS,
    "exaone": {},
    "gemma4_text": {
        "head_dim": 12,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "tie_word_embeddings": True,
    },
    "gemma": HEADS,
    "glm": HEADS,
    "granite_swa": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
    },
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hyperclovax": {"use_post_norm": False, "logits_scaling": 0.125},
    "internlm3": HEADS,
    "iquestcoder": HEADS,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral": HEADS,
    "ministral3": {
        **HEADS,
        "rope_parameters": {
            "rope_theta": 1e6,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "nemotron_h": {
        **HEADS,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
    },
    "olmo3": {},
    "phi3": {},
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
    },
    "seed_oss": HEADS,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "vaultgemma": {
        **HEADS,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "youtu": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
}


def written(family: str) -> dict[str, Any]:
    """What `save_pretrained` writes of a family."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), family, **FAMILIES[family])
        config = json.loads((Path(folder) / "config.json").read_text())
        del config["transformers_version"]
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return {"family": family, "config": config, "tensors": shapes}


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as output:
        for each in FAMILIES:
            output.write(json.dumps(written(each)) + "\n")
