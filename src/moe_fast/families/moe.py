"""What every MoE family has in common: names, shapes, configuration, what fits it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from moe_fast.config import Layout, MoeConfig, RoutingMethod
from moe_fast.dtypes import DTYPE_NAMES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import ORIGINAL, ROPE_TYPES
from moe_fast.families.dense import FFN, NORMS_BEFORE, QK, DenseFamily, DenseModel
from moe_fast.families.key_types import TYPES
from moe_fast.families.rules import VLLM, Rules
from moe_fast.request import ExpertSource
from moe_fast.storage.pieces import HalvesToPairs, PairsToHalves
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import OutputTensor, Weight
from moe_fast.wording import format_numbers

GATE_UP = ("gate_proj", "up_proj")
Shapes = dict[str, tuple[int, ...]]
SPANS = {None: "nothing", "head": "each head", "width": "the full width"}


class ExpertTensor(NamedTuple):
    """A tensor with weights of experts: `slices` are `(expert, role)`, one after the other.

    A stacked tensor has a first axis that counts the experts.
    """

    name: str
    slices: tuple[tuple[int, str], ...]
    stacked: bool = False


class Parts(Protocol):
    """What an MoE is made of: its facts, and each weight by what it is for."""

    @property
    def base(self) -> DenseModel:
        """The model that gives attention, norms and embeddings."""
        ...

    @property
    def config(self) -> MoeConfig: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def granularity(self) -> int:
        """In how many experts each feed-forward network is split."""
        ...

    @property
    def expert_width(self) -> int:
        """The `intermediate_size` of one expert."""
        ...

    @property
    def mix_copies(self) -> bool:
        """Whether a token may be sent to shards of several copies."""
        ...

    @property
    def shared_experts(self) -> Sequence[ExpertSource]: ...

    @property
    def dense_layers(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        ...

    def before_layers(self) -> Iterator[OutputTensor]:
        """The embedding."""
        ...

    def layer(self, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, with their names inside the layer."""
        ...

    def after_layers(self) -> Iterator[OutputTensor]:
        """The last norm and the head."""
        ...

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        ...

    def expert(self, layer: int, expert: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of an expert."""
        ...

    def dense_ffn(self, layer: int, role: str) -> Weight:
        """The same of a layer without experts."""
        ...

    def shared_ffn(self, layer: int, role: str) -> Weight:
        """The same of all shared experts of a layer side by side."""
        ...

    def silent_ffn(self, layer: int, width: int, role: str) -> Weight:
        """The same of a shared expert that adds nothing."""
        ...

    def shared_gate(self, layer: int) -> Weight:
        """What the sigmoid that weighs the shared expert reads, `(1, hidden_size)`."""
        ...


# What transformers takes for a key that a config.json leaves out, in most MoE families.
DEFAULTS_OF_MOE: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "num_key_value_heads": None,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# The keys that no config.json may leave out, though transformers has defaults for them too.
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)


class MoeFamily:
    """A Mixture-of-Experts family: what fits it, its tensors, its configuration.

    What it says of attention and norms is what its blocks have a place for. Its router is a softmax
    over all experts; each token goes to the k with the greatest weights, which are divided by their
    sum. So experts that are copies of one FFN compute what that FFN computes.
    """

    name: str
    title: str
    architecture: str
    dense_twin: str
    """The dense family that it is outside of its experts."""
    rules: Rules
    defaults: Mapping[str, Any] = DEFAULTS_OF_MOE
    """The keys of config.json that the family reads, with what readers take for missing ones."""
    types: Mapping[str, str] = MappingProxyType({})
    """The types of keys that have another type here than in other families."""
    auto_rank: int | None = None
    """Where `target="auto"` tries it, the more readers the earlier; `None` where it does not."""
    mergekit_name: str | None = None
    """What mergekit-moe calls the architecture; None where it does not write it."""
    layouts: tuple[Layout, ...] = (Layout.PER_EXPERT, Layout.FUSED)
    norms = NORMS_BEFORE
    qk_norms: tuple[str | None, ...] = (None,)
    attention_biases: tuple[tuple[str, ...], ...] = ((),)
    own_head_dim = True
    sliding_window = True
    multipliers = False
    rope_types: Sequence[str] = ROPE_TYPES
    shared_experts = False
    shared_gate = False
    dense_places = "has experts in every layer"
    expert_names: tuple[tuple[str, str], ...] = tuple((role, role) for role in FFN)
    block = "mlp"
    partial_rotary = False
    """Whether models of the family may rotate a part of each head."""
    unlike_windows = False
    """Whether layers may differ in their sliding window."""
    unlike_ropes = False
    """Whether they may differ in the base of their rotary embedding."""
    rope_by_kind = False
    """Whether `rope_parameters` holds one for each kind of layer."""
    interleaved = False
    """Whether the rotary embedding turns neighbours, as in some dense families."""
    sinks = False
    """Whether each head of attention has a sink, which takes a part of its weights."""
    blocks: str | None = None
    """What its layers are made of, as a dense family names it, if not of plain attention."""
    plain_too = False
    """Whether all its layers may be of plain attention, though it has such blocks."""
    names: tuple[tuple[str, str], ...] = ()
    """Parts of names, each with what it is in the family's files."""
    wrappers: Mapping[str, tuple[str, str]] = MappingProxyType({})
    """Multimodal models of dense ones, each with `model_type` and class of that with experts."""
    also_read: tuple[str, ...] = ()
    """Keys of config.json without a default that say what blocks are like."""
    pads = True
    """Whether transformers gives the embedding a row for padding, which must be there."""
    own_expert_width = True
    """Whether the width of experts has a key beside `intermediate_size`."""
    scaling_key: str | None = None
    """What the family multiplies the experts' output with, if it has a key for that."""
    has_groups = False
    """Whether a token chooses groups of experts before it chooses experts."""

    def problems(self, parts: Parts, layout: Layout | None = None) -> list[str]:
        """Why this cannot become the target, all reasons; empty where it can."""
        reasons = [*self.routing_problems(parts), *self.block_problems(parts.base)]
        if layout not in (None, *self.layouts):
            reasons.append(f"layout {str(layout)!r}: {self.title} has only {self.layouts[0]!s}")
        return reasons

    def routing_problems(self, parts: Parts) -> Iterator[str]:
        config, hidden = parts.config, parts.base.sizes.hidden_size
        if config.routing_method is not RoutingMethod.TOP_K:
            yield (
                f"routing_method {str(config.routing_method)!r}: readers of {self.title} "
                "checkpoints route by 'top_k' alone"
            )
        if config.gate_hidden_dim not in (None, hidden):
            yield (
                f"gate_hidden_dim {config.gate_hidden_dim}: {self.title}'s router reads the "
                f"model's hidden size, {hidden}"
            )
        shared = parts.shared_experts
        if shared and not self.shared_experts:
            yield f"shared experts ({', '.join(e.model for e in shared)}): {self.title} has none"
        elif not self.shared_gate:
            for expert in shared:
                if expert.positive_prompts or expert.negative_prompts:
                    yield (
                        f"prompts of the shared expert {expert.model}: {self.title} has no gate "
                        "for it that prompts could make"
                    )
        with_ffn = parts.base.ffn_layers
        layers = frozenset(layer for layer in parts.dense_layers if layer in with_ffn)
        if self.dense_keys(layers, parts.num_layers) is None:
            listed = ", ".join(map(str, sorted(layers)))
            yield f"dense_layers {listed}: {self.title} {self.dense_places}"

    def may_take(self, family: DenseFamily) -> bool:
        """Whether some models of a dense family fit, whatever their configurations say."""
        if self.has_own_blocks(family):
            return self.blocks == family.blocks
        biases = family.biases is None or family.biases in self.attention_biases
        norms = family.norms == self.norms and family.qk_norm in self.qk_norms
        multipliers = self.multipliers or not family.multipliers
        whole = self.partial_rotary or family.defaults.get("partial_rotary_factor", 1) == 1
        sinks = self.sinks or not family.sinks
        return biases and norms and multipliers and whole and sinks

    def has_own_blocks(self, family: DenseFamily) -> bool:
        """Whether one of the two has blocks that are not plain attention and an FFN."""
        plain = self.blocks is None or self.plain_too
        return not plain or family.blocks is not None

    def block_problems(self, base: DenseModel) -> Iterator[str]:
        """What the base's blocks have or lack."""

        def at(name: str) -> str:
            tensor = base.tensors[f"model.layers.0.{name}"]
            return f"{tensor.file.path}: tensor {tensor.name!r}"

        config, sizes = f"{base.path / 'config.json'}", base.sizes
        if self.has_own_blocks(base.family):
            kind = base.family.model_type
            if base.family.blocks is None:
                yield f"{config}: model_type {kind} has no {self.blocks}; {self.title} has"
            elif base.family.blocks != self.blocks:
                yield f"{config}: {self.title} has no place for {kind}'s {base.family.blocks}"
            elif base.ffn_biases:
                yield f"{config}: mlp_bias: {self.title} has no place for FFN biases"
            return
        if base.family.norms != self.norms:
            place = "before" if self.norms == NORMS_BEFORE else "after"
            (norm, *_) = (name for name in base.family.norms if name not in self.norms)
            yield f"{at(f'{norm}.weight')}: {self.title} has norms only {place} attention and FFN"
        if base.family.qk_norm not in self.qk_norms:
            if base.family.qk_norm is None:
                yield (
                    f"{config}: model_type {base.family.model_type} has no norm on queries and "
                    f"keys; {self.title} has one over {SPANS[self.qk_norms[0]]}, and "
                    "no choice of weights cancels it"
                )
            else:
                yield (
                    f"{at('self_attn.q_norm.weight')}: {self.title} has no place for a norm over "
                    f"{SPANS[base.family.qk_norm]} of queries and keys"
                )
        if base.attention_biases not in self.attention_biases:
            name = base.attention_biases[-1]
            yield f"{at(f'self_attn.{name}.bias')}: {self.title} has no place for this bias"
        if base.ffn_biases:
            yield f"{at('mlp.gate_proj.bias')}: {self.title} has no place for FFN biases"
        if not self.own_head_dim and sizes.head_dim * sizes.num_attention_heads != (
            sizes.hidden_size
        ):
            yield (
                f"{at('self_attn.q_proj.weight')}: head_dim is {sizes.head_dim}; readers of "
                f"{self.title} take hidden_size / num_attention_heads, "
                f"{sizes.hidden_size} / {sizes.num_attention_heads}"
            )
        longest = base.config["max_position_embeddings"]
        windows = {width if width and width < longest else None for width in base.windows}
        if len(windows) > 1 and self.sliding_window and not self.unlike_windows:
            yield f"{config}: sliding_window in only some layers, {self.title} has it in all"
        elif windows != {None} and not self.sliding_window:
            width = max(width for width in windows if width)
            yield f"{config}: sliding_window is {width}; {self.title} has none"
        if base.rope.layer_thetas is not None and not self.unlike_ropes:
            bare = [n for n, theta in enumerate(base.rope.layer_thetas) if not theta]
            what = f"{format_numbers('layer', bare)} without rotary embedding"
            yield f"{config}: {what if bare else 'rope_theta differs'}; {self.title} has one in all"
        if base.rope.partial != 1 and not self.partial_rotary:
            yield (
                f"{config}: partial_rotary_factor is {base.rope.partial}; {self.title} rotates "
                "whole heads"
            )
        if base.family.sinks and not self.sinks:
            yield f"{at('self_attn.sinks')}: {self.title} has no place for sinks of attention"
        neutral = (1.0, sizes.head_dim**-0.5, 1.0, 1.0)
        if not self.multipliers and base.multipliers != neutral:
            names = zip(base.multipliers._fields, base.multipliers, neutral, strict=True)
            found = [f"{name} {value}" for name, value, none in names if value != none]
            yield f"{config}: {', '.join(found)}: {self.title} has no multipliers"
        rope = "default" if base.rope.scaling is None else base.rope.scaling["rope_type"]
        if rope not in self.rope_types:
            yield (
                f"{config}: rope_type is {rope!r}; "
                f"{self.title} has only {', '.join(self.rope_types)}"
            )

    @property
    def count_keys(self) -> tuple[str, ...]:
        """The keys that hold the number of experts."""
        other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
        key = self.rules.count_key
        return (key, other[key]) if self.rules.either_count_key else (key,)

    def key_types(self) -> dict[str, str]:
        """The types of the keys that the family reads."""
        types = {**TYPES, **self.types}
        keys = (*REQUIRED, *self.defaults)
        return {key: types[key] for key in keys if key in types}

    def effective_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of `config` that the family reads, and its defaults for missing ones."""
        keys = (*REQUIRED, *ROPE, *self.defaults, *self.count_keys, *self.also_read)
        read = {key: config[key] for key in keys if key in config}
        return {"rope_theta": self.rules.default_theta, **self.defaults, **read}

    def twin_name(self, config: Mapping[str, Any]) -> str:
        """The dense family that a checkpoint of this config.json is outside of its experts."""
        return self.dense_twin

    def kept_for_dense(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a config.json of the family that its dense twin spells otherwise."""
        return {}

    def warnings(self, parts: Parts) -> list[str]:
        """What fits the target and may yet surprise."""
        return []

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        """The keys of config.json that leave exactly these layers dense; `None` if none can."""
        return None if layers else {}

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        """The layers that a config.json of the family leaves dense.

        Raises
        ------
        CheckpointError
            Where a key of it has a value of another kind.
        """
        return frozenset()

    def dense_width(self, config: Mapping[str, Any]) -> int:
        """The width of the FFN in layers without experts."""
        return as_count(config, "intermediate_size", minimum=1)

    def expert_input(self, config: Mapping[str, Any], hidden: int) -> int:
        """The size of what an expert reads and writes."""
        return hidden

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        """The tensors that hold a layer's experts, in order."""
        experts = range(num_experts)
        prefix = f"model.layers.{layer}.{self.block}.experts"
        if layout is Layout.PER_EXPERT:
            return [
                ExpertTensor(f"{prefix}.{expert}.{name}.weight", ((expert, role),))
                for expert in experts
                for name, role in self.expert_names
            ]
        return stacks(f"{prefix}.gate_up_proj", f"{prefix}.down_proj", experts)

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def name_in_files(self, name: str) -> str:
        """What the family's files call a tensor."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name

    def tensors(self, parts: Parts, layout: Layout | None = None) -> Iterator[OutputTensor]:
        """Every tensor of the output, in the order of the model."""
        for name, weight in self.tensors_here(parts, layout or self.layouts[0]):
            yield OutputTensor(self.name_in_files(name), weight)

    def tensors_here(self, parts: Parts, layout: Layout) -> Iterator[OutputTensor]:
        """The same, under the names that they have here."""
        num_experts = parts.num_experts
        dense = frozenset(parts.dense_layers)
        yield from parts.before_layers()
        for layer in range(parts.num_layers):
            prefix = f"model.layers.{layer}"
            for name, weight in self.attention(parts, layer):
                yield OutputTensor(f"{prefix}.{name}", weight)
            if layer in dense:
                roles = parts.base.family.roles if layer in parts.base.ffn_layers else ()
                for role in roles:
                    name = f"{prefix}.mlp.{role}.weight"
                    yield OutputTensor(name, parts.dense_ffn(layer, role))
                continue
            yield OutputTensor(self.router_name(layer, layout), parts.router(layer))
            for tensor in self.expert_tensors(layer, num_experts, layout):
                weights = [parts.expert(layer, e, role) for e, role in tensor.slices]
                yield OutputTensor(tensor.name, joined(weights, tensor, num_experts))
            for name, weight in self.shared(parts, layer):
                yield OutputTensor(f"{prefix}.{name}", weight)
        yield from parts.after_layers()

    def attention(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, with their names inside the layer."""
        for name, weight in parts.layer(layer):
            turned = name.startswith(tuple(f"self_attn.{each}." for each in QK))
            yield name, as_pairs(weight, parts.base) if self.interleaved and turned else weight

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        """What belongs to the shared experts of a layer, with its names inside the layer."""
        yield from ()

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        """What a config.json of the family makes the shapes of these tensors.

        Raises
        ------
        CheckpointError
            Where a key of it has a value of another kind.
        """
        return {}

    def config(self, parts: Parts) -> dict[str, Any]:
        """The output's config.json, in the spellings of transformers 4 and 5.

        Every key stands there whose default differs from reader to reader or from the source's.
        """
        carried = (
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "attention_dropout",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
        base, sizes = parts.base, parts.base.sizes
        dtype = DTYPE_NAMES[parts.dtype]
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size
            if self.own_expert_width
            else parts.expert_width,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            **({"head_dim": sizes.head_dim} if self.own_head_dim else {}),
            **{key: base.config[key] for key in carried},
            **self.own_config(parts),
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "output_router_logits": False,
            **base.rope.in_every_spelling(),
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        """Why a reader does not load a checkpoint of this family alone."""
        yield from ()

    def own_config(self, parts: Parts) -> dict[str, Any]:
        """The keys that this family alone has."""
        raise NotImplementedError


class LayerLists(MoeFamily):
    """Families that say in `mlp_layer_types` which layers have experts."""

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().reader_problems(reader, config)
        said = "mlp_layer_types" in config and "first_k_dense_replace" not in config
        if reader == VLLM and self.counts_first and said:
            yield (
                f"looks for first_k_dense_replace in a {self.name}, config.json has "
                "mlp_layer_types alone"
            )

    counts_first = False
    """Whether vLLM looks at `first_k_dense_replace` instead."""
    first_is_dense = False
    """Whether the first layer has none where config.json does not say."""

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        kinds = ["dense" if layer in layers else "sparse" for layer in range(num_layers)]
        first = {"first_k_dense_replace": len(layers)} if self.counts_first else {}
        return {
            "mlp_layer_types": kinds,
            **(first if layers == frozenset(range(len(layers))) else {}),
        }

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        kinds = config.get("mlp_layer_types")
        if kinds is None:
            return frozenset({0} if self.first_is_dense else ())
        if not isinstance(kinds, list):
            raise CheckpointError(
                f"mlp_layer_types is {brief(kinds)}; it must list kinds", file="config.json"
            )
        return frozenset(n for n, kind in enumerate(kinds[:num_layers]) if kind == "dense")


def windows_as_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `layer_types` says, as Qwen's dense families want to be told."""
    return {"use_sliding_window": "sliding_attention" in (config.get("layer_types") or ())}


def as_pairs(weight: Weight, base: DenseModel) -> Weight:
    """Queries or keys for a rotary embedding that turns neighbours."""
    (piece,) = weight.pieces
    if isinstance(piece, PairsToHalves):  # as they were
        return Weight(weight.dtype, weight.shape, (piece.source,))
    size = base.sizes.head_dim
    turned, nbytes = int(size * base.rope.partial), weight.nbytes // weight.shape[0]
    piece = HalvesToPairs(piece, nbytes, size, turned)
    return Weight(weight.dtype, weight.shape, (piece,))


def stacks(gate_up: str, down: str, experts: range) -> list[ExpertTensor]:
    """Gate over up of every expert in one tensor, down of every expert in another."""
    pairs = tuple((expert, role) for expert in experts for role in GATE_UP)
    downs = tuple((expert, "down_proj") for expert in experts)
    return [ExpertTensor(gate_up, pairs, stacked=True), ExpertTensor(down, downs, stacked=True)]


def joined(weights: Sequence[Weight], tensor: ExpertTensor, num_experts: int) -> Weight:
    """The weights of a tensor's parts as that tensor."""
    rows, columns = weights[0].shape
    if not tensor.stacked:
        return Weight.stacked(weights, (rows * len(weights), columns))
    return Weight.stacked(weights, (num_experts, rows * len(weights) // num_experts, columns))


def shared_or_silent(
    parts: Parts, layer: int, width: int, roles: Sequence[str] = FFN
) -> Iterator[tuple[str, Weight]]:
    """The shared experts by role; where none is asked for, one of this width that adds nothing."""
    for role in roles:
        if parts.shared_experts:
            yield role, parts.shared_ffn(layer, role)
        else:
            yield role, parts.silent_ffn(layer, width, role)


def biases_of(shapes: Shapes) -> Shapes:
    """The biases beside these weights."""
    return {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in shapes.items()}


def ffn_shapes(prefix: str, width: int, hidden: int) -> Shapes:
    down = FFN[-1]
    return {
        f"{prefix}.{role}.weight": (hidden, width) if role == down else (width, hidden)
        for role in FFN
    }


def as_count(
    config: Mapping[str, Any], key: str, default: int | None = None, *, minimum: int = 0
) -> int:
    """An integer of a config.json."""
    value = config.get(key, default)
    if type(value) is not int or value < minimum:
        raise CheckpointError(
            f"{key} is {brief(value)}; it must be an integer of at least {minimum}",
            file="config.json",
        )
    return value


def num_experts(parts: Parts) -> dict[str, int]:
    """The number of experts in both spellings, of which each reader looks for one."""
    number = parts.num_experts
    return {"num_local_experts": number, "num_experts": number}
