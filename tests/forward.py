"""A Llama and Mixtral forward pass in plain float64 NumPy, written like the papers' formulas.

Slow and small: it exists so that the ordinary tests see that a built MoE computes what its dense
model computes, without any framework.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class Model:
    """The weights of a model folder and its configuration."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: array.astype(np.float64)
            for file in sorted(folder.glob("*.safetensors"))
            for name, array in load_file(file).items()
        }
        heads = self.config["num_attention_heads"]
        self.heads = heads
        self.key_heads = self.config.get("num_key_value_heads", heads)
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `[T, vocab]` of the token ids `[T]`."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normed = self.rms_norm(x, prefix + "input_layernorm.weight")
            x = x + self.attention(normed, prefix + "self_attn.")
            normed = self.rms_norm(x, prefix + "post_attention_layernorm.weight")
            x = x + self.feed_forward(normed, prefix)
        x = self.rms_norm(x, "model.norm.weight")
        tied = self.config["tie_word_embeddings"]
        return x @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name]

    def attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        count = len(x)

        def heads(name: str, number: int) -> np.ndarray:
            projected = x @ self.weights[f"{prefix}{name}.weight"].T
            return projected.reshape(count, number, self.head_dim).transpose(1, 0, 2)

        queries = self.rotate(heads("q_proj", self.heads))
        keys = self.rotate(heads("k_proj", self.key_heads))
        values = heads("v_proj", self.key_heads)
        group = self.heads // self.key_heads
        scores = queries @ keys.repeat(group, axis=0).transpose(0, 2, 1) / np.sqrt(self.head_dim)
        scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
        mixed = softmax(scores) @ values.repeat(group, axis=0)
        return (
            mixed.transpose(1, 0, 2).reshape(count, -1) @ self.weights[f"{prefix}o_proj.weight"].T
        )

    def rotate(self, x: np.ndarray) -> np.ndarray:
        half = self.head_dim // 2
        angles = np.arange(x.shape[1])[:, None] * self.config["rope_theta"] ** (
            -np.arange(half) / half
        )
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def feed_forward(self, x: np.ndarray, prefix: str) -> np.ndarray:
        if self.config["model_type"] != "mixtral":
            return self.expert(x, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))
        prefix += "block_sparse_moe."
        probabilities = softmax(x @ self.weights[prefix + "gate.weight"].T)
        y = np.zeros_like(x)
        for token, row in enumerate(probabilities):
            chosen = np.argsort(-row, kind="stable")[: self.config["num_experts_per_tok"]]
            for expert in chosen:
                name = f"{prefix}experts.{expert}."
                share = row[expert] / row[chosen].sum()
                y[token] += share * self.expert(x[token], name, ("w1", "w3", "w2"))
        return y

    def expert(self, x: np.ndarray, prefix: str, names: tuple[str, str, str]) -> np.ndarray:
        gate, up, down = (self.weights[f"{prefix}{name}.weight"] for name in names)
        gated = x @ gate.T
        return (gated / (1.0 + np.exp(-gated)) * (x @ up.T)) @ down.T


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
