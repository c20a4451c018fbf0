"""Dense and Mixture-of-Experts forward passes in float64 NumPy, written like the papers' formulas.

Slow and small: it exists so that the ordinary tests see that a built MoE computes what its dense
model computes, without any framework. tests/real compares it, and the built models, with
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

DENSE = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite")
FFN = ("gate_proj", "up_proj", "down_proj")
ROUTERS = (
    "mlp.gate",
    "mlp.router.gate",
    "block_sparse_moe.gate",
    "block_sparse_moe.router.layer",
    "block_sparse_moe.router",
)
Ffn = tuple[np.ndarray, np.ndarray, np.ndarray]


class Model:
    """The weights of a model folder and its configuration."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.kind = self.config["model_type"]
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
        x = x * self.config.get("embedding_multiplier", 1.0)
        residual = self.config.get("residual_multiplier", 1.0)
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            attention = prefix + "post_attention_layernorm"
            ffn = prefix + "post_feedforward_layernorm"
            if ffn + ".weight" in self.weights:
                x = x + self.rms_norm(self.attention(x, prefix + "self_attn."), attention)
                x = x + self.rms_norm(self.feed_forward(x, prefix), ffn)
            else:
                normed = self.rms_norm(x, prefix + "input_layernorm")
                x = x + residual * self.attention(normed, prefix + "self_attn.")
                x = x + residual * self.feed_forward(self.rms_norm(x, attention), prefix)
        x = self.rms_norm(x, "model.norm")
        tied = self.config["tie_word_embeddings"]
        logits = x @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T
        return logits / self.config.get("logits_scaling", 1.0)

    def rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name + ".weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)

    def attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        count = len(x)

        def heads(name: str, number: int) -> np.ndarray:
            projected = self.linear(x, f"{prefix}{name}_proj")
            norm = self.weights.get(f"{prefix}{name}_norm.weight")
            if norm is not None and norm.size != self.head_dim:
                projected = self.rms_norm(projected, f"{prefix}{name}_norm")
            projected = projected.reshape(count, number, self.head_dim)
            if norm is not None and norm.size == self.head_dim:
                projected = self.rms_norm(projected, f"{prefix}{name}_norm")
            return projected.transpose(1, 0, 2)

        layer = int(prefix.split(".")[2])
        queries = self.rotate(heads("q", self.heads), layer)
        keys = self.rotate(heads("k", self.key_heads), layer)
        values = heads("v", self.key_heads)
        group = self.heads // self.key_heads
        scale = self.config.get("attention_multiplier", self.head_dim**-0.5)
        scores = queries @ keys.repeat(group, axis=0).transpose(0, 2, 1) * scale
        distance = np.arange(count)[:, None] - np.arange(count)
        used = self.config.get("use_sliding_window", True) and self.config.get("sliding_window")
        if "layer_rope_theta" in self.config:
            used = used if self.config["layer_types"][layer] == "sliding_attention" else None
        scores[:, (distance < 0) | (distance >= (used or count))] = -np.inf
        sinks = self.weights.get(f"{prefix}sinks")
        if sinks is not None:
            column = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, column], axis=-1)
        shares = softmax(scores)[..., :count]
        mixed = shares @ values.repeat(group, axis=0)
        return self.linear(mixed.transpose(1, 0, 2).reshape(count, -1), f"{prefix}o_proj")

    def rotate(self, x: np.ndarray, layer: int) -> np.ndarray:
        half = self.head_dim // 2
        theta = self.rope_theta(layer)
        if theta == 0:
            return x
        frequencies = theta ** (-np.arange(half) / half)
        scaling = self.config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "linear":
            frequencies = frequencies / scaling["factor"]
        elif kind == "llama3":  # Long waves are stretched, short ones kept (Dubey et al. 2024).
            waves = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
            frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
        else:
            assert kind == "default", kind
        angles = np.arange(x.shape[1])[:, None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        if self.kind == "ernie4_5_moe":  # neighbours turn together
            first, second = x[..., ::2], x[..., 1::2]
            turned = first * cos - second * sin, second * cos + first * sin
            return np.stack(turned, axis=-1).reshape(x.shape)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def rope_theta(self, layer: int) -> float:
        """The base of a layer's rotary embedding; 0 if it has none."""
        if "layer_rope_theta" in self.config:
            return self.config["layer_rope_theta"][layer]
        if "rope_theta" in self.config:
            return self.config["rope_theta"]
        return self.config["rope_parameters"][self.config["layer_types"][layer]]["rope_theta"]

    def feed_forward(self, x: np.ndarray, prefix: str) -> np.ndarray:
        if self.kind in DENSE or f"{prefix}mlp.gate_proj.weight" in self.weights:
            return swiglu(x, self.ffn(prefix + "mlp."))
        (router_name,) = (
            prefix + name for name in ROUTERS if f"{prefix}{name}.weight" in self.weights
        )
        router = self.weights[router_name + ".weight"]
        block = ".".join(router_name.split(".")[:4]) + "."
        experts = list(self.experts(block, len(router)))
        sigmoid = self.kind == "glm4_moe"
        logits = x @ router.T
        probabilities = 1.0 / (1.0 + np.exp(-logits)) if sigmoid else softmax(logits)
        y = self.shared(x, prefix)
        top_k = self.config["num_experts_per_tok"]
        for token, row in enumerate(probabilities):
            chosen = np.argsort(-self.choosable(row, block), kind="stable")[:top_k]
            shares = row[chosen]
            as_it_is = self.kind == "deepseek" and top_k == 1
            if self.config.get("norm_topk_prob", True) and not as_it_is:
                shares = shares / shares.sum()
            if sigmoid:
                shares = shares * self.config["routed_scaling_factor"]
            for expert, share in zip(chosen, shares, strict=True):
                y[token] += share * swiglu(x[token], experts[expert])
        return y

    def choosable(self, scores: np.ndarray, block: str) -> np.ndarray:
        """Scores with their bias, minus infinity in groups that are not chosen."""
        groups = self.config.get("n_group", 1)
        scores = scores + self.weights.get(f"{block}gate.e_score_correction_bias", 0.0)
        if groups == 1:
            return scores
        grouped = scores.reshape(groups, -1)
        best = np.argsort(-np.sort(grouped)[:, -2:].sum(axis=1), kind="stable")
        grouped[best[self.config["topk_group"] :]] = -np.inf
        return grouped.reshape(-1)

    def ffn(self, prefix: str, names: tuple[str, str, str] = FFN) -> Ffn:
        gate, up, down = (self.weights[f"{prefix}{name}.weight"] for name in names)
        return gate, up, down

    def experts(self, block: str, number: int) -> Iterator[Ffn]:
        for gate_up, down in (
            ("experts.gate_up_proj", "experts.down_proj"),
            ("input_linear.weight", "output_linear.weight"),
        ):
            if block + gate_up in self.weights:
                for both, below in zip(
                    self.weights[block + gate_up], self.weights[block + down], strict=True
                ):
                    yield *np.split(both, 2), below
                return
        names = ("w1", "w3", "w2") if "block" in block else FFN
        for expert in range(number):
            yield self.ffn(f"{block}experts.{expert}.", names)

    def shared(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """What shared experts add for every token."""
        if self.kind == "qwen2_moe":
            gate = x @ self.weights[prefix + "mlp.shared_expert_gate.weight"].T
            return swiglu(x, self.ffn(prefix + "mlp.shared_expert.")) / (1.0 + np.exp(-gate))
        if self.kind in ("deepseek", "glm4_moe") and self.config["n_shared_experts"] is not None:
            return swiglu(x, self.ffn(prefix + "mlp.shared_experts."))
        if self.config.get("shared_intermediate_size"):
            gate, up = np.split(self.weights[prefix + "shared_mlp.input_linear.weight"], 2)
            return swiglu(x, (gate, up, self.weights[prefix + "shared_mlp.output_linear.weight"]))
        return np.zeros_like(x)


def swiglu(x: np.ndarray, weights: Ffn) -> np.ndarray:
    gate, up, down = weights
    gated = x @ gate.T
    return (gated / (1.0 + np.exp(-gated)) * (x @ up.T)) @ down.T


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
