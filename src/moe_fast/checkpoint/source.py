"""A dense model on disk: its configuration and its tensors, checked against each other.

A family says which tensors its models have, and what its configuration means where it is silent.
Nothing here knows what the model is to become.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_fast.checkpoint.header import Tensor, read_checkpoint, read_json
from moe_fast.errors import CheckpointError

FFN = ("gate_proj", "up_proj", "down_proj")


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


@dataclass(frozen=True)
class Family:
    """A dense architecture: `model_type`, defaults of its configuration, tensors of a layer."""

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, FFN apart, with their shapes."""
        hidden = sizes.hidden_size
        queries = sizes.num_attention_heads * sizes.head_dim
        keys = sizes.num_key_value_heads * sizes.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        if config.get("attention_bias"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                rows = shapes[f"self_attn.{name}.weight"][0]
                shapes[f"self_attn.{name}.bias"] = (rows,)
        shapes |= {f"{norm}.weight": (hidden,) for norm in self.norms}
        return shapes

    def ffn_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer's feed-forward network, with their shapes."""
        hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        if config.get("mlp_bias"):
            shapes |= {
                name.replace("weight", "bias"): shape[:1] for name, shape in list(shapes.items())
            }
        return shapes


# What transformers takes for a key that a config.json leaves out, where a target's own default
# differs and would silently change the model.
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", LLAMA_DEFAULTS),
        Family(
            "mistral",
            {
                **LLAMA_DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
    )
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and its scaling if it has any."""

    theta: float
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class DenseModel:
    """A dense model folder, its headers read and every tensor accounted for."""

    path: Path
    family: Family
    config: Mapping[str, Any]
    sizes: Sizes
    rope: Rope
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


def open_dense_model(path: str | os.PathLike[str]) -> DenseModel:
    """Read a model folder's configuration and headers; no weight is read.

    Raises
    ------
    CheckpointError
        With every problem of the folder, each naming its file and tensor.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder with a model")
    config_file = folder / "config.json"
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file}: must be a JSON object")
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{config_file}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{config_file}: the model is quantised; dequantise it before it becomes experts"
        )
    config = {**family.defaults, **config}
    sizes = read_sizes(config, config_file)
    rope = read_rope(config, config_file)
    tensors = read_checkpoint(folder)
    check_tensors(folder, family, config, sizes, tensors)
    return DenseModel(folder, family, config, sizes, rope, tensors)


def read_sizes(config: Mapping[str, Any], file: Path) -> Sizes:
    problems = []

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            missing = "is missing" if key not in config else f"is {value!r}"
            problems.append(f"{file}: {key} {missing}; it must be an integer of at least 1")
            return 1
        return value

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
            raise CheckpointError(f"{file}: {key} is {value!r}; it must be an object or null")
    merged = {**(scaling or {}), **(parameters or {})}
    theta = merged.pop("rope_theta", config["rope_theta"])
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
        raise CheckpointError(f"{file}: rope_theta is {theta!r}; it must be a positive number")
    kind = merged.get("rope_type", merged.get("type", "default"))
    return Rope(theta, None if kind == "default" else {"rope_type": kind, **merged})


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
    if sizes.num_hidden_layers > len(present):
        raise CheckpointError(
            f"{folder}: config.json has num_hidden_layers {sizes.num_hidden_layers}, "
            f"the safetensors hold tensors of {len(present)} layers"
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
        f"{folder}: tensor {name!r} is missing" for name in expected.keys() - tensors.keys()
    ]
    for name, tensor in tensors.items():
        shape = expected.get(name, optional.get(name))
        where = f"{tensor.file.path}: tensor {name!r}"
        if shape is None:
            if not name.endswith("rotary_emb.inv_freq"):  # old exports; readers compute it
                problems.append(f"{where} is not part of a {family.model_type} model")
        elif tensor.shape != shape:
            problems.append(
                f"{where} has the shape {list(tensor.shape)}, config.json makes it {list(shape)}"
            )
        elif tensor.dtype not in ("F32", "F16", "BF16"):
            problems.append(f"{where} is {tensor.dtype}; F32, F16 and BF16 can be built from")
    if problems:
        raise CheckpointError(*sorted(problems))
