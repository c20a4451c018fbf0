"""What every dense family has in common, and a dense model as it was read.

A family says what its files call the tensors that others have too, which of them lie in one tensor
there, and in which order the rows of queries and keys stand. Everything else sees Llama's names,
and through `DenseModel.weight` Llama's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import (
    Multipliers,
    Rope,
    Sizes,
    is_count,
    read_rope,
    read_sizes,
)
from moe_fast.records import dataclass
from moe_fast.storage.fp8 import Block, dequantised
from moe_fast.storage.pieces import PairsToHalves, Shifted
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

FFN = ("gate_proj", "up_proj", "down_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV = QKVO[:3]
QK = QKVO[:2]
# What some families store in one tensor, one part over the next.
FUSED_QKV = ("self_attn.qkv_proj", tuple(f"self_attn.{name}" for name in QKV))
FUSED_GATE_UP = ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))
# Norms before attention and FFN, as almost everywhere, or after them.
NORMS_BEFORE = ("input_layernorm", "post_attention_layernorm")
LAST_NORM = "model.norm.weight"
NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class DenseFamily:
    """A dense architecture: what its configuration says where it is silent, what a layer holds.

    `qk_norm` is the span of the norm on queries and keys: each "head" by itself, their whole
    "width", or none. `biases` names the projections that always have one; `None` leaves it to
    `bias_keys`, the keys of config.json that say so, each with its projections. `mlp_bias` says
    whether the FFN can have them. `windows` says which layers a sliding window is for: "all", those
    that "layer_types" names, or "none". Where `layer_types` is missing, one layer in so many sees
    everything: `full_attention` is `(how many, which of them)`.

    `names` are pairs of a part of a name here and that part in the family's files; `fused` are the
    tensors that hold several, with those. `aliases` are other names of keys in config.json.
    `interleaved` says whether the rotary embedding turns neighbours, 0 with 1, rather than halves;
    `partial_rotary`, whether it may turn a part of each head. `sinks` says whether each head of
    attention has one. `blocks` names what its layers are made of if that is something else than all
    this; it fits MoE families of the same blocks alone. `unread` are the beginnings of names of
    tensors that no reader makes anything of, such as those of layers that predict ahead. Where the
    FFN is not `gated`, it has two matrices, up and down. `norm_shift` is what norms add to their
    weights before they multiply with them. `runs_by_layer` says whether layers need nothing but the
    state that the one before leaves, and its routers will read what its FFNs do.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, str] = NORMS_BEFORE
    qk_norm: str | None = None
    biases: tuple[str, ...] | None = None
    mlp_bias: bool = False
    windows: str = "none"
    multipliers: bool = False
    class_name: str | None = None
    bias_keys: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType({"attention_bias": QKVO})
    )
    full_attention: tuple[int, int] | None = None
    names: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    interleaved: bool = False
    partial_rotary: bool = False
    sinks: bool = False
    blocks: str | None = None
    unread: tuple[str, ...] = ()
    gated: bool = True
    norm_shift: float = 0.0
    runs_by_layer: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        """The matrices of its FFN."""
        return FFN if self.gated else FFN[1:]

    @property
    def architecture(self) -> str:
        """The class of transformers, as its config.json names it."""
        plain = "".join(map(str.capitalize, self.model_type.split("_"))) + "ForCausalLM"
        return self.class_name or plain

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json under the names of keys that are used here, nothing left out."""
        config = {self.aliases.get(key, key): value for key, value in config.items()}
        missing = self.defaults.keys() - config.keys()
        if {"rope_theta", "rope_scaling"} & config.keys():
            missing -= {"rope_parameters"}  # the same by another name
        return {**{key: self.defaults[key] for key in self.defaults if key in missing}, **config}

    def name_here(self, name: str) -> str:
        """What a tensor of the family's files is called here."""
        for ours, theirs in self.names:
            name = name.replace(theirs, ours)
        return name

    def name_in_files(self, name: str) -> str:
        """What the family's files call a tensor."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name

    def stored(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
        """The tensors that hold those of `shapes`, each with its parts from the first row on."""
        found: dict[str, tuple[str, ...]] = {name: (name,) for name in shapes}
        for whole, parts in self.fused:
            for name in shapes:
                before, part, kind = name.partition(f"{parts[0]}.")
                if part:
                    held = tuple(f"{before}{each}.{kind}" for each in parts)
                    for each in held:
                        found.pop(each)
                    found[f"{before}{whole}.{kind}"] = held
        return found

    def attention_biases(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The projections that have a bias."""
        if self.biases is not None:
            return self.biases
        return tuple(n for key, names in self.bias_keys.items() if config[key] for n in names)

    @property
    def ffn_module(self) -> str:
        """What the family calls its FFN."""
        return self.name_in_files(".mlp.down_proj.").split(".")[1]

    def of_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        """The keys of an MoE's config.json that a dense model made of it has otherwise."""
        return {"intermediate_size": width}

    def ffn_bias_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The matrices of the FFN that have a bias."""
        return self.roles if self.mlp_bias and config["mlp_bias"] else ()

    def is_moe(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json of the same `model_type` has experts already."""
        return False

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        """The sizes that a config.json of the family gives."""
        return read_sizes(config, file)

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        """The rotary embedding that a config.json of the family describes."""
        return read_rope(config, file, partial=self.partial_rotary)

    def read_multipliers(self, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
        """What activations are multiplied with."""
        if self.multipliers:
            return Multipliers(*(config[name] for name in Multipliers._fields))
        return Multipliers(1.0, sizes.head_dim**-0.5, 1.0, 1.0)

    def reservations(self, config: Mapping[str, Any], dtype: str) -> Iterator[str]:
        """Where an MoE made of weights of a `dtype` does not compute what its source does."""
        yield from ()

    def outer_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to no layer, the head apart, with their shapes."""
        return {
            "model.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size),
            LAST_NORM: (sizes.hidden_size,),
        }

    def layer_shapes(
        self, sizes: Sizes, config: Mapping[str, Any], layer: int
    ) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer, FFN apart, with their shapes."""
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
        if self.sinks:
            shapes["self_attn.sinks"] = (sizes.num_attention_heads,)
        return shapes | {f"{norm}.weight": (hidden,) for norm in self.norms}

    def ffn_layers(self, sizes: Sizes, config: Mapping[str, Any]) -> Sequence[int]:
        """The layers that have a feed-forward network: all, in most families."""
        return range(sizes.num_hidden_layers)

    def ffn_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer's feed-forward network, with their shapes."""
        hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            f"mlp.{role}.weight": (hidden, intermediate)
            if role == "down_proj"
            else (intermediate, hidden)
            for role in self.roles
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
class Wrapper:
    """The model that a language model is a part of, as multimodal checkpoints have it.

    `prefix` is what its files have in place of `model.`, `head` the name of the head there; `rest`
    are the tensors of everything but the language model.
    """

    config: Mapping[str, Any]
    prefix: str
    head: str
    rest: Mapping[str, Tensor]


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
    """Every tensor by its name here; parts of one tensor of a file are tensors of their own."""
    stored: Mapping[str, Tensor]
    """Every tensor of the language model in the files, by its name in the family."""
    wrapper: Wrapper | None = None
    scales: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Of each tensor in FP8, by its name here, what its blocks are multiplied with."""
    block: Block | None = None
    """The rows and columns that share a scale."""
    unread: tuple[str, ...] = ()
    """Tensors of the files that no part of the model is made of."""

    def dtype_of(self, tensor: Tensor) -> str:
        """The dtype of a tensor, of one in FP8 that which it is dequantised to."""
        quantised = self.block is not None and tensor.dtype not in WEIGHT_DTYPES
        return self.tensors[LAST_NORM].dtype if quantised else tensor.dtype

    @property
    def identity(self) -> str:
        """What tells it from other models."""
        return str(self.path)

    def changed(self, name: str, dtype: str | None = None) -> Weight:
        """A tensor with whatever this model changes of it, in the order of its file."""
        tensor = self.tensors[name]
        if self.block is not None and name in self.scales:
            to = dtype or self.dtype_of(tensor)
            return dequantised(tensor, self.scales[name], self.block, to)
        return Weight.of(tensor)

    def sources(self) -> Iterator[Mapping[str, Tensor]]:
        """The tensors that it is made of, of each folder."""
        yield self.every_tensor

    def ffn(self, layer: int, role: str) -> Tensor:
        """The `gate_proj`, `up_proj` or `down_proj` weight of a layer, as its file has it."""
        return self.tensors[ffn_name(layer, role)]

    def ffn_weight(self, layer: int, role: str, dtype: str | None = None) -> Weight:
        """The same with whatever this model changes of it, as `weight` gives it."""
        return self.weight(ffn_name(layer, role), dtype)

    def weight(self, name: str, dtype: str | None = None) -> Weight:
        """The same as others have it: the rows of queries and keys in Llama's order, norms as they
        multiply, in float32 where that is not what the file has.

        What is in FP8 is dequantised to `dtype`, or that of the norms; others keep theirs.
        """
        weight = self.changed(name, dtype)
        part = name.rpartition("self_attn.")[2].partition(".")[0]
        if self.family.interleaved and part in (*QK, "q_norm", "k_norm"):
            size = self.sizes.head_dim
            turned = int(size * self.rope.partial)
            nbytes = weight.nbytes // weight.shape[0]
            (piece,) = weight.pieces
            weight = Weight(
                weight.dtype, weight.shape, (PairsToHalves(piece, nbytes, size, turned),)
            )
        if self.family.norm_shift and name.endswith("norm.weight"):
            (piece,) = weight.pieces
            shifted = Shifted(piece, weight.dtype, self.family.norm_shift)
            weight = Weight("F32", weight.shape, (shifted,))
        return weight

    def before_layers(self) -> Iterator[tuple[str, Tensor]]:
        """The embedding, and what else belongs to no layer and is no last norm."""
        for name in self.family.outer_shapes(self.sizes, self.config):
            if name != LAST_NORM:
                yield from self.named(name)

    def layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer apart from its FFN, with their names inside the layer."""
        for name in self.family.layer_shapes(self.sizes, self.config, layer):
            yield name, self.tensors[f"model.layers.{layer}.{name}"]

    def after_layers(self) -> Iterator[tuple[str, Tensor]]:
        """The last norm, and the head where the model stores one, with their names."""
        yield from self.named(LAST_NORM)
        if "lm_head.weight" in self.tensors:
            yield from self.named("lm_head.weight")

    def named(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield name, self.tensors[name]

    @property
    def every_tensor(self) -> dict[str, Tensor]:
        """Every tensor of the files that an output may have something of."""
        return {**self.stored, **({} if self.wrapper is None else self.wrapper.rest)}

    @property
    def ffn_layers(self) -> Sequence[int]:
        """The layers that have an FFN."""
        return self.family.ffn_layers(self.sizes, self.config)

    @property
    def first_ffn(self) -> Tensor:
        """The first matrix of the first FFN."""
        return self.ffn(self.ffn_layers[0], self.family.roles[0])

    @property
    def expert_dtype(self) -> str:
        """The dtype of the FFN weights, as safetensors spells it."""
        return self.dtype_of(self.first_ffn)

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
        family.windows == "layer_types" and config.get("use_sliding_window", True)
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
    if types is None and family.full_attention is not None:
        every, which = family.full_attention
        return tuple(None if layer % every == which else window for layer in range(layers))
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
