"""What every dense family has in common, and a dense model as it was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import Multipliers, Rope, Sizes, is_count
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

FFN = ("gate_proj", "up_proj", "down_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV = QKVO[:3]
# Norms before attention and FFN, as almost everywhere, or after them.
NORMS_BEFORE = ("input_layernorm", "post_attention_layernorm")
NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class DenseFamily:
    """A dense architecture: what its configuration says where it is silent, what a layer holds.

    `qk_norm` is the span of the norm on queries and keys: each "head" by itself, their whole
    "width", or none. `biases` names the projections that always have one; `None` leaves it to
    `attention_bias`. `mlp_bias` says whether the FFN can have them. `windows` says which layers a
    sliding window is for: "all", those that "layer_types" names, or "none".
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, str] = NORMS_BEFORE
    qk_norm: str | None = None
    biases: tuple[str, ...] | None = None
    mlp_bias: bool = False
    windows: str = "none"
    multipliers: bool = False

    @property
    def architecture(self) -> str:
        """The class of transformers, as its config.json names it."""
        return "".join(map(str.capitalize, self.model_type.split("_"))) + "ForCausalLM"

    def attention_biases(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The projections that have a bias."""
        if self.biases is not None:
            return self.biases
        return QKVO if config["attention_bias"] else ()

    def ffn_bias_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The matrices of the FFN that have a bias."""
        return FFN if self.mlp_bias and config["mlp_bias"] else ()

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, FFN apart, with their shapes."""
        hidden = sizes.hidden_size
        queries = sizes.num_attention_heads * sizes.head_dim
        keys = sizes.num_key_value_heads * sizes.head_dim
        rows = dict(zip(QKVO, (queries, keys, keys, hidden), strict=True))
        columns = dict(zip(QKVO, (hidden, hidden, hidden, queries), strict=True))
        shapes: dict[str, tuple[int, ...]] = {}
        for name in QKVO:
            shapes[f"self_attn.{name}.weight"] = (rows[name], columns[name])
        for name in self.attention_biases(config):
            shapes[f"self_attn.{name}.bias"] = (rows[name],)
        if self.qk_norm is not None:
            per_head = self.qk_norm == "head"
            shapes["self_attn.q_norm.weight"] = (sizes.head_dim if per_head else queries,)
            shapes["self_attn.k_norm.weight"] = (sizes.head_dim if per_head else keys,)
        return shapes | {f"{norm}.weight": (hidden,) for norm in self.norms}

    def ffn_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer's feed-forward network, with their shapes."""
        hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        for name in self.ffn_bias_names(config):
            shapes[f"mlp.{name}.bias"] = shapes[f"mlp.{name}.weight"][:1]
        return shapes


# What transformers takes for a key that a config.json leaves out. The families differ from each
# other and from the targets, so that a key left out would silently change the model.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class DenseModel:
    """A dense model folder, its headers read and every tensor accounted for.

    `windows` holds the width of each layer's sliding window, `None` where a layer sees everything.
    """

    path: Path
    family: DenseFamily
    config: Mapping[str, Any]
    sizes: Sizes
    rope: Rope
    windows: tuple[int | None, ...]
    multipliers: Multipliers
    tensors: Mapping[str, Tensor]

    @property
    def identity(self) -> str:
        """What tells it from other models."""
        return str(self.path)

    def weight(self, name: str) -> Weight:
        """A tensor with whatever this model changes of it."""
        return Weight.of(self.tensors[name])

    def sources(self) -> Iterator[Mapping[str, Tensor]]:
        """The tensors that it is made of, of each folder."""
        yield self.tensors

    def ffn(self, layer: int, role: str) -> Tensor:
        """The `gate_proj`, `up_proj` or `down_proj` weight of a layer, as its file has it."""
        return self.tensors[ffn_name(layer, role)]

    def ffn_weight(self, layer: int, role: str) -> Weight:
        """The same with whatever this model changes of it."""
        return self.weight(ffn_name(layer, role))

    def before_layers(self) -> Iterator[tuple[str, Tensor]]:
        """The embedding, with its name."""
        yield from self.named("model.embed_tokens.weight")

    def layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer apart from its FFN, with their names inside the layer."""
        for name in self.family.layer_shapes(self.sizes, self.config):
            yield name, self.tensors[f"model.layers.{layer}.{name}"]

    def after_layers(self) -> Iterator[tuple[str, Tensor]]:
        """The last norm, and the head where the model stores one, with their names."""
        yield from self.named("model.norm.weight")
        if "lm_head.weight" in self.tensors:
            yield from self.named("lm_head.weight")

    def named(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield name, self.tensors[name]

    @property
    def expert_dtype(self) -> str:
        """The dtype of the FFN weights, as safetensors spells it."""
        return self.ffn(0, "gate_proj").dtype

    @property
    def attention_biases(self) -> tuple[str, ...]:
        """The projections of the attention that have a bias."""
        return self.family.attention_biases(self.config)

    @property
    def ffn_biases(self) -> tuple[str, ...]:
        """The matrices of the FFN that have a bias."""
        return self.family.ffn_bias_names(self.config)


def ffn_name(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.{role}.weight"


def read_windows(
    family: DenseFamily, config: Mapping[str, Any], sizes: Sizes, file: Path
) -> tuple[int | None, ...]:
    """Each layer's sliding window, `None` where the layer sees everything before it."""
    layers = sizes.num_hidden_layers
    used = family.windows == "all" or (
        family.windows == "layer_types" and config["use_sliding_window"]
    )
    window = config["sliding_window"] if used else None
    if window is None:
        return (None,) * layers
    if not is_count(window):
        raise CheckpointError(
            f"sliding_window is {brief(window)}; it must be an integer of at least 1, or null",
            file=file,
        )
    if family.windows == "all":
        return (window,) * layers
    types = config["layer_types"]
    if types is None:
        first = config["max_window_layers"]
        if type(first) is not int:
            raise CheckpointError(
                f"max_window_layers is {brief(first)}; it must be an integer", file=file
            )
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(
            f"layer_types is {brief(types)}; it must list {layers} types", file=file
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def read_multipliers(family: DenseFamily, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
    if family.multipliers:
        return Multipliers(*(config[name] for name in Multipliers._fields))
    return Multipliers(1.0, sizes.head_dim**-0.5, 1.0, 1.0)
