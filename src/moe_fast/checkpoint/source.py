"""A dense model on disk: its configuration and its tensors, checked against each other.

A family says which tensors its models have, and what its configuration means where it is silent.
Nothing here knows what the model is to become.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_fast.checkpoint.header import (
    LARGEST_SIZE,
    WEIGHT_DTYPES,
    Tensor,
    read_checkpoint,
    read_config,
    shown,
)
from moe_fast.errors import CheckpointError

FFN = ("gate_proj", "up_proj", "down_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV = QKVO[:3]
# Norms before attention and FFN, as almost everywhere, or after them.
NORMS_BEFORE = ("input_layernorm", "post_attention_layernorm")
NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
# Kinds of rotary embedding, each with the keys that it cannot do without.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ROPE_TYPES = tuple(ROPE_KEYS)
# The context that a model was trained with before its rope was scaled. Where config.json has it
# outside of the scaling, that counts for these.
ORIGINAL = "original_max_position_embeddings"
ROPES_WITH_ORIGINAL = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Sizes:
    """The numbers that every tensor shape of a dense transformer follows from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Multipliers(NamedTuple):
    """What Granite multiplies its activations with; elsewhere all but the attention's are 1."""

    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float


@dataclass(frozen=True)
class Family:
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
QWEN_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", DEFAULTS, mlp_bias=True),
        Family(
            "mistral",
            {
                **DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            biases=(),
            windows="all",
        ),
        Family("qwen2", QWEN_DEFAULTS, biases=QKV, windows="layer_types"),
        Family("qwen3", {**QWEN_DEFAULTS, "head_dim": 128}, qk_norm="head", windows="layer_types"),
        Family(
            "olmo2",
            {
                **DEFAULTS,
                "rms_norm_eps": 1e-5,
                "pad_token_id": 1,
                "bos_token_id": None,
                "eos_token_id": 50279,
            },
            norms=NORMS_AFTER,
            qk_norm="width",
        ),
        Family(
            "granite",
            {
                **DEFAULTS,
                "embedding_multiplier": 1.0,
                "attention_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            mlp_bias=True,
            multipliers=True,
        ),
    )
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and its scaling if it has any."""

    theta: float
    scaling: Mapping[str, Any] | None = None

    def in_every_spelling(self) -> dict[str, Any]:
        """The keys of `config.json` that say so, for every reader."""
        scaling = None if self.scaling is None else dict(self.scaling)
        keys = {
            "rope_theta": self.theta,
            "rope_scaling": scaling,
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": self.theta},
        }
        if scaling is not None and scaling["rope_type"] == "longrope" and ORIGINAL in scaling:
            keys[ORIGINAL] = scaling[ORIGINAL]  # transformers 4 looks for it there alone
        return keys


@dataclass(frozen=True)
class DenseModel:
    """A dense model folder, its headers read and every tensor accounted for.

    `windows` holds the width of each layer's sliding window, `None` where a layer sees everything.
    """

    path: Path
    family: Family
    config: Mapping[str, Any]
    sizes: Sizes
    rope: Rope
    windows: tuple[int | None, ...]
    multipliers: Multipliers
    tensors: Mapping[str, Tensor]

    def ffn(self, layer: int, role: str) -> Tensor:
        """The `gate_proj`, `up_proj` or `down_proj` weight of a layer."""
        return self.tensors[f"model.layers.{layer}.mlp.{role}.weight"]

    def before_layers(self) -> Iterator[Tensor]:
        """The embedding."""
        yield self.tensors["model.embed_tokens.weight"]

    def layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer apart from its FFN, with their names inside the layer."""
        for name in self.family.layer_shapes(self.sizes, self.config):
            yield name, self.tensors[f"model.layers.{layer}.{name}"]

    def after_layers(self) -> Iterator[Tensor]:
        """The last norm, and the head where the model stores one."""
        yield self.tensors["model.norm.weight"]
        if "lm_head.weight" in self.tensors:
            yield self.tensors["lm_head.weight"]

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


def open_dense_model(path: str | os.PathLike[str]) -> DenseModel:
    """Read a model folder's configuration and headers; no weight is read.

    Raises
    ------
    CheckpointError
        With every problem of the folder, each naming its file and tensor.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    config = read_config(folder)
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        if any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise CheckpointError(
                f"{config_file}: the model ({model_type}) is a Mixture of Experts already; experts "
                "are made from dense models"
            )
        raise CheckpointError(
            f"{config_file}: model_type {shown(model_type)} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{config_file}: the model is quantised; dequantise it before it becomes experts"
        )
    config = {**family.defaults, **config}
    check_values(config, config_file)
    sizes = read_sizes(config, config_file)
    rope = read_rope(config, config_file)
    tensors = read_checkpoint(folder)
    check_tensors(folder, family, config, sizes, tensors)
    windows = read_windows(family, config, sizes, config_file)
    multipliers = read_multipliers(family, config, sizes)
    return DenseModel(folder, family, config, sizes, rope, windows, multipliers, tensors)


def check_values(config: Mapping[str, Any], file: Path) -> None:
    """The values that decide what a model computes have their types; raise all that have not."""
    problems = [
        f"{file}: {key} is {shown(config[key])}; it must be {kind}"
        for kind, (holds, keys) in KINDS.items()
        for key in keys
        if key in config and not holds(config[key])
    ]
    if problems:
        raise CheckpointError(*problems)


def is_number(value: Any) -> bool:
    """Whether `value` is one that every reader can hold: JSON has integers of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def is_token(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) <= LARGEST_SIZE)


# What must hold of a key wherever a configuration has it.
KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a string": (lambda value: isinstance(value, str), ("hidden_act",)),
    "an integer of at least 1": (is_count, ("max_position_embeddings",)),
    "a positive number": (
        lambda value: is_number(value) and value > 0,
        ("rms_norm_eps", *Multipliers._fields),
    ),
    "a number of at least 0": (
        lambda value: is_number(value) and value >= 0,
        ("initializer_range", "attention_dropout"),
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    ),
    "a token's number or null": (is_token, ("bos_token_id", "pad_token_id")),
    "a token's number, a list of them or null": (
        lambda value: all(map(is_token, value)) if isinstance(value, list) else is_token(value),
        ("eos_token_id",),
    ),
}


def read_sizes(config: Mapping[str, Any], file: Path) -> Sizes:
    problems = []

    def size(key: str, default: int | None = None) -> int:
        value: Any = config.get(key)
        if value is None and default is not None:
            return default
        if not is_count(value):
            missing = "is missing" if key not in config else f"is {shown(value)}"
            problems.append(f"{file}: {key} {missing}; it must be an integer of at least 1")
            return 1
        return int(value)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    sizes = Sizes(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", max(hidden // heads, 1)),
    )
    if problems:
        raise CheckpointError(*problems)
    return sizes


def read_rope(config: Mapping[str, Any], file: Path) -> Rope:
    """The rotary embedding from either spelling: `rope_parameters`, or theta with scaling."""
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} is {shown(value)}; it must be an object or null")
    merged = {**(scaling or {}), **(parameters or {})}
    theta = merged.pop("rope_theta", config["rope_theta"])
    if not is_number(theta) or not theta > 0:
        raise CheckpointError(f"{file}: rope_theta is {shown(theta)}; it must be a positive number")
    kind = merged.get("rope_type", merged.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{file}: rope_type is {shown(kind)}; known are {', '.join(ROPE_TYPES)}"
        )
    if kind in ROPES_WITH_ORIGINAL and config.get(ORIGINAL) is not None:
        merged[ORIGINAL] = config[ORIGINAL]
    for key in ROPE_KEYS[kind]:
        if key not in merged:
            raise CheckpointError(f"{file}: rope_type {kind!r} needs the key {key!r}")
    part = merged.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if part != 1:
        raise CheckpointError(
            f"{file}: partial_rotary_factor is {shown(part)}; no target rotates a part of a head"
        )
    for key, value in merged.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(is_number(n) or isinstance(n, (str, bool, type(None))) for n in numbers):
            raise CheckpointError(
                f"{file}: the rope's {shown(key)} is {shown(value)}; "
                "it must be a number or a list of numbers"
            )
    return Rope(theta, None if kind == "default" else {"rope_type": kind, **merged})


def read_windows(
    family: Family, config: Mapping[str, Any], sizes: Sizes, file: Path
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
            f"{file}: sliding_window is {shown(window)}; "
            "it must be an integer of at least 1, or null"
        )
    if family.windows == "all":
        return (window,) * layers
    types = config["layer_types"]
    if types is None:
        first = config["max_window_layers"]
        if type(first) is not int:
            raise CheckpointError(
                f"{file}: max_window_layers is {shown(first)}; it must be an integer"
            )
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"{file}: layer_types is {shown(types)}; it must list {layers} types")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def read_multipliers(family: Family, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
    if family.multipliers:
        return Multipliers(*(config[name] for name in Multipliers._fields))
    return Multipliers(1.0, sizes.head_dim**-0.5, 1.0, 1.0)


def check_tensors(
    folder: Path,
    family: Family,
    config: Mapping[str, Any],
    sizes: Sizes,
    tensors: dict[str, Tensor],
) -> None:
    """Every expected tensor is there with its shape, and no other is; raise all problems."""
    per_layer = family.layer_shapes(sizes, config) | family.ffn_shapes(sizes, config)
    present = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    # Before looping over a number from a file: that many layers must be able to be there.
    layers = sizes.num_hidden_layers
    if layers > len(present) or layers * len(per_layer) > 2 * len(tensors):
        raise CheckpointError(
            f"{folder}: config.json has num_hidden_layers {layers}, "
            f"the safetensors hold {len(tensors)} tensors of {len(present)} layers"
        )
    expected = {
        "model.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size),
        "model.norm.weight": (sizes.hidden_size,),
    }
    for layer in range(sizes.num_hidden_layers):
        expected |= {f"model.layers.{layer}.{name}": s for name, s in per_layer.items()}
    optional = {"lm_head.weight": (sizes.vocab_size, sizes.hidden_size)}
    if not config["tie_word_embeddings"]:
        expected |= optional
    problems = [
        f"{folder}: tensor {shown(name)} is missing" for name in expected.keys() - tensors.keys()
    ]
    for name, tensor in tensors.items():
        shape = expected.get(name, optional.get(name))
        if tensor.shape == shape and tensor.dtype in WEIGHT_DTYPES:
            continue
        where = f"{tensor.file.path}: tensor {shown(name)}"
        if shape is None:
            if not name.endswith("rotary_emb.inv_freq"):  # old exports; readers compute it
                problems.append(f"{where} is not part of a {family.model_type} model")
        elif tensor.shape != shape:
            problems.append(
                f"{where} has the shape {list(tensor.shape)}, config.json makes it {list(shape)}"
            )
        else:
            problems.append(f"{where} is {tensor.dtype}; F32, F16 and BF16 can be built from")
    if problems:
        raise CheckpointError(*sorted(problems))
