"""What readers other than transformers are asked to compute: outputs of every family.

The models have heads of 32: vLLM's attention wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from folders import config_of
from forward import Model
from logits import compute_logits, log_softmax
from moe_fast import check_moe
from moe_fast.families.rules import Reader

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "olmo2, biases": ("olmo2", {"attention_bias": True}),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 8.0}),
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
]


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    source, target, options = case
    return f"{source} to {target}, {' '.join(options)}"


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
