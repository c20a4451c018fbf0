"""Small dense models of every source family, with random weights where training leaves none.

Norms are not ones and biases not zeros, so that one in the wrong place changes the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dense_families import write_dense

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
OWN = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
# For heads of 12.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "original_max_position_embeddings": 16,
}


def make_model(
    folder: Path, family: str, *, seed: int = 0, dtype: Any = np.float32, **changes: Any
) -> Path:
    """Write a model of `family` with these `changes` to its configuration; return its folder."""
    if family not in OWN:
        write_dense(folder, family, seed=seed, dtype=dtype, **changes)
        return folder
    config = {"model_type": family, **COMMON, **OWN[family], **changes}
    generator = np.random.default_rng(seed)

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + generator.normal(scale=0.2, size=shape)).astype(dtype)

    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": normal(hidden, mean=1.0),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        rows = {"q": queries, "k": keys, "v": keys, "o": hidden}
        for name, size in rows.items():
            columns = queries if name == "o" else hidden
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(size, columns)
        biased = "qkv" if family == "qwen2" else "qkvo" * bool(config.get("attention_bias"))
        for name in biased:
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows[name])
        if family in ("qwen3", "olmo2"):
            per_head = family == "qwen3"
            for name, size in (("q", queries), ("k", keys)):
                norm = normal(head_dim if per_head else size, mean=1.0)
                tensors[f"{prefix}self_attn.{name}_norm.weight"] = norm
        norms = ["post_attention_layernorm"]
        norms.append("post_feedforward_layernorm" if family == "olmo2" else "input_layernorm")
        for name in norms:
            tensors[f"{prefix}{name}.weight"] = normal(hidden, mean=1.0)
        for name, shape in (
            ("gate_proj", (intermediate, hidden)),
            ("up_proj", (intermediate, hidden)),
            ("down_proj", (hidden, intermediate)),
        ):
            tensors[f"{prefix}mlp.{name}.weight"] = normal(*shape)
            if config.get("mlp_bias"):
                tensors[f"{prefix}mlp.{name}.bias"] = normal(shape[0])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
