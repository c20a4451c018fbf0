"""Granite, and GraniteMoE with or without shared experts, sinks and sliding windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import CheckpointError
from moe_fast.families.config import Multipliers, Rope, Sizes, is_number
from moe_fast.families.dense import DEFAULTS, NORMS_BEFORE, QKVO, DenseFamily
from moe_fast.families.experts import GRANITE_STACKED, ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    GATE_UP,
    ExpertTensor,
    MoeFamily,
    Parts,
    Shapes,
    as_count,
    num_experts,
    shared_or_silent,
    stacks,
)
from moe_fast.families.rules import (
    LLAMA_CPP,
    READERS,
    TRANSFORMERS_5,
    VLLM,
    Rules,
)
from moe_fast.families.twins import OwnBlocks, Twin, attention_shapes, read_kinds
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

SLIDING = "sliding_attention"
# A sink takes its share of a softmax; this one takes none.
NO_SINK = -1e4


def without_usual_head_dim(config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Few readers look at the key."""
    usual = sizes.hidden_size // sizes.num_attention_heads
    return {k: v for k, v in config.items() if (k, v) != ("head_dim", usual)}


def head_problems(name: str, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Readers that take a head's size for the usual one."""
    size, heads = config.get("head_dim"), config.get("num_attention_heads")
    sizes = isinstance(size, int) and isinstance(heads, int) and size * heads
    if reader != TRANSFORMERS_5 and sizes not in (False, config.get("hidden_size")):
        yield f"takes hidden_size / num_attention_heads for the head_dim of a {name}"


class GraniteMoe(MoeFamily):
    """GraniteMoE: experts fused on disk, multipliers on embedding, attention, residual, logits."""

    name = "granitemoe"
    title = "GraniteMoE"
    architecture = "GraniteMoeForCausalLM"
    auto_rank = 4
    rules = Rules(
        "num_local_experts",
        8,
        1e4,
        llama_cpp_sentencepiece=True,
        per_expert=(),
        fused=READERS,
    )
    defaults: Mapping[str, Any] = {
        **DEFAULTS_OF_MOE,
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "bos_token_id": 1,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "logits_scaling": 1.0,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
        "router_aux_loss_coef": 0.001,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float | int | None",
        "num_experts_per_tok": "int | None",
        "num_key_value_heads": "int | None",
        "num_local_experts": "int | None",
        "output_router_logits": "bool | None",
        "router_aux_loss_coef": "float | None",
    }
    dense_twin = "granite"
    layouts = (Layout.FUSED,)
    attention_biases = ((), QKVO)
    sliding_window = False
    multipliers = True
    block = "block_sparse_moe"
    own_expert_width = False

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        prefix = f"model.layers.{layer}.{self.block}"
        names = (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight")
        return stacks(*names, range(num_experts))

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.router.layer.weight"

    def config(self, parts: Parts) -> dict[str, Any]:
        return without_usual_head_dim(super().config(parts), parts.base.sizes)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **num_experts(parts),
            "attention_bias": bool(parts.base.attention_biases),
            **parts.base.multipliers._asdict(),
            "router_aux_loss_coef": 0.001,
        }

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from head_problems(self.name, reader, config)
        if reader == VLLM and config.get("attention_bias"):
            yield f"leaves the biases of attention out of a {self.name}"


class GraniteMoeShared(GraniteMoe):
    """GraniteMoE with shared experts, whose outputs are added to the routed ones'."""

    name = "granitemoeshared"
    title = "GraniteMoE Shared"
    architecture = "GraniteMoeSharedForCausalLM"
    auto_rank = 6
    defaults: Mapping[str, Any] = {**GraniteMoe.defaults, "shared_intermediate_size": 0}
    shared_experts = True

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        if parts.shared_experts:
            gate, up = (parts.shared_ffn(layer, role) for role in GATE_UP)
            width, hidden = gate.shape
            yield "shared_mlp.input_linear.weight", Weight.stacked((gate, up), (2 * width, hidden))
            yield "shared_mlp.output_linear.weight", parts.shared_ffn(layer, "down_proj")

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_intermediate_size", 0)
        if not width:
            return {}
        return {
            "shared_mlp.input_linear.weight": (2 * width, hidden),
            "shared_mlp.output_linear.weight": (hidden, width),
        }

    def own_config(self, parts: Parts) -> dict[str, Any]:
        width = len(parts.shared_experts) * parts.base.sizes.intermediate_size
        return {**super().own_config(parts), "shared_intermediate_size": width}


class GraniteMoeSwa(GraniteMoeShared):
    """GraniteMoE with a sink in each head, windows and bases of the rotary embedding by layer."""

    name = "granitemoe_swa"
    title = "GraniteMoE SWA"
    architecture = "GraniteMoeSWAForCausalLM"
    auto_rank = 9
    rules = Rules(
        "num_local_experts",
        8,
        1e4,
        llama_cpp_windows=True,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
        per_expert=(),
        fused=READERS,
    )
    defaults: Mapping[str, Any] = {
        **GraniteMoeShared.defaults,
        "layer_rope_theta": None,
        "layer_types": None,
        "sliding_window": 128,
    }
    types: Mapping[str, str] = {
        **GraniteMoeShared.types,
        "layer_rope_theta": "list[float | int] | None",
    }
    dense_twin = "granite_swa"
    sinks = True
    sliding_window = True
    unlike_windows = True
    unlike_ropes = True

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        prefix = f"model.layers.{layer}.{self.block}.experts"
        return stacks(f"{prefix}.gate_up_proj", f"{prefix}.down_proj", range(num_experts))

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.router.weight"

    def attention(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield from parts.layer(layer)
        if not parts.base.family.sinks:
            heads = parts.base.sizes.num_attention_heads
            yield "self_attn.sinks", Weight.filled(parts.dtype, (heads,), NO_SINK)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        windows, rope = parts.base.windows, parts.base.rope
        bare = rope.layer_thetas is not None and not all(rope.layer_thetas)
        # Where llama.cpp looks for them.
        rotated = {"no_rope_layers": [int(theta > 0) for theta in rope.layer_thetas or ()]}
        widths = [width for width in windows if width is not None]
        return {
            **super().own_config(parts),
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
            # transformers wants one though no layer uses it.
            "sliding_window": widths[0] if widths else parts.base.config["max_position_embeddings"],
            "layer_rope_theta": list(rope.layer_thetas or [float(rope.theta)] * len(windows)),
            **(rotated if bare else {}),
        }

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().reader_problems(reader, config)
        if reader != LLAMA_CPP:
            return
        if SLIDING not in (config.get("layer_types") or [SLIDING]):
            yield f"wants a sliding window in some layers of a {self.name}"
        thetas = {theta for theta in config.get("layer_rope_theta") or [] if theta}
        if len(thetas) > 1:
            yield f"has one rope_theta for all layers of a {self.name}, here are {len(thetas)}"


class GraniteSwa(DenseFamily):
    """Granite with sinks, and layers that differ in window and rotary embedding."""

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        rope = super().read_rope(config, sizes, file)
        thetas = config["layer_rope_theta"]
        if thetas is None:
            return rope
        if (
            not isinstance(thetas, list)
            or len(thetas) != sizes.num_hidden_layers
            or not all(is_number(theta) and theta >= 0 for theta in thetas)
        ):
            raise CheckpointError(
                f"layer_rope_theta is {brief(thetas)}; it must list {sizes.num_hidden_layers} "
                "numbers of at least 0",
                file=file,
            )
        same = set(thetas) == {rope.theta}
        return rope if same else replace(rope, layer_thetas=tuple(map(float, thetas)))


MAMBA = "Mamba-2 layers"
KINDS = {
    "attention": "full_attention",
    "full_attention": "full_attention",
    "mamba": "linear_attention",
    "linear_attention": "linear_attention",
}
DEFAULTS_OF_HYBRID: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 1.0,
    "bos_token_id": 1,
    "embedding_multiplier": 1.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": None,
    "logits_scaling": 1.0,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "num_key_value_heads": None,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": None,
    "position_embedding_type": None,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "shared_intermediate_size": 1024,
    "tie_word_embeddings": False,
    "time_step_limit": (0.0, float("inf")),
    "use_cache": True,
}


def kinds_of(config: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """Which layers attend; by default none."""
    return read_kinds(config, sizes, ["mamba"] * sizes.num_hidden_layers, KINDS)


class GraniteHybrid(OwnBlocks):
    """Granite 4 (IBM 2025): Mamba-2 (Dao and Gu 2024) in most layers, its FFN the shared one.

    The same `model_type` is an MoE where `num_local_experts` is not 0.
    """

    def is_moe(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("num_local_experts", 8) != 0)

    def of_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        return {"shared_intermediate_size": width, "num_local_experts": 0}

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        width = config["shared_intermediate_size"]
        return super().read_sizes({**config, "intermediate_size": width}, file)

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        hidden = sizes.hidden_size
        norms: Shapes = {f"{norm}.weight": (hidden,) for norm in NORMS_BEFORE}
        if kinds_of(config, sizes)[layer] == "full_attention":
            return attention_shapes(sizes, bias=config["attention_bias"]) | norms
        heads, groups, state, reach, factor = (
            as_count(config, f"mamba_{name}", minimum=1)
            for name in ("n_heads", "n_groups", "d_state", "d_conv", "expand")
        )
        inner = factor * hidden
        mixed = inner + 2 * groups * state
        shapes: Shapes = {
            "mamba.A_log": (heads,),
            "mamba.D": (heads,),
            "mamba.dt_bias": (heads,),
            "mamba.conv1d.weight": (mixed, 1, reach),
            "mamba.in_proj.weight": (inner + mixed + heads, hidden),
            "mamba.norm.weight": (inner,),
            "mamba.out_proj.weight": (hidden, inner),
        }
        if config["mamba_conv_bias"]:
            shapes["mamba.conv1d.bias"] = (mixed,)
        if config["mamba_proj_bias"]:
            shapes |= {"mamba.in_proj.bias": (inner + mixed + heads,)}
            shapes |= {"mamba.out_proj.bias": (hidden,)}
        return shapes | norms


class GraniteMoeHybrid(Twin):
    """Granite 4 with experts, besides a shared FFN, which adds nothing where none is asked for.

    A model of plain attention becomes one without Mamba-2 layers.
    """

    name = "granitemoehybrid"
    title = "GraniteMoE Hybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    auto_rank = 14
    rules = Rules(
        "num_local_experts",
        8,
        1e4,
        per_expert=(),
        fused=READERS,
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_HYBRID
    types: Mapping[str, str] = {
        **GraniteMoe.types,
        **dict.fromkeys(Multipliers._fields, "int | float | None"),
    }
    dense_twin = "granitemoehybrid"
    also_read = ("head_dim", "time_step_limit")
    blocks = MAMBA
    plain_too = True
    layouts = (Layout.FUSED,)
    attention_biases = ((), QKVO)
    sliding_window = False
    multipliers = True
    block = "block_sparse_moe"
    own_expert_width = False
    shared_experts = True
    dropped = ("layers_block_type",)
    # Divides among tensor-parallel ranks and fills a block of llama.cpp's quantisation.
    silent_width = 256

    expert_tensors = GraniteMoe.expert_tensors
    router_name = GraniteMoe.router_name
    shared_shapes = GraniteMoeShared.shared_shapes

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from head_problems(self.name, reader, config)
        rotated = config.get("position_embedding_type") == "rope"
        plain = set(config.get("layer_types") or ()) <= {"attention"}
        if reader == LLAMA_CPP and config and rotated != plain:
            which = "without" if plain else "with"
            yield (
                f"{'rotates' if plain else 'does not rotate'} queries and keys of a {self.name} "
                f"{which} Mamba-2 layers"
            )

    def shared_width(self, parts: Parts) -> int:
        width = parts.base.sizes.intermediate_size
        return len(parts.shared_experts) * width or min(self.silent_width, width)

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        width, hidden = self.shared_width(parts), parts.base.sizes.hidden_size
        gate, up, down = (weight for _, weight in shared_or_silent(parts, layer, width))
        yield "shared_mlp.input_linear.weight", Weight.stacked((gate, up), (2 * width, hidden))
        yield "shared_mlp.output_linear.weight", down

    def config(self, parts: Parts) -> dict[str, Any]:
        if parts.base.family.blocks is None:
            return without_usual_head_dim(MoeFamily.config(self, parts), parts.base.sizes)
        return super().config(parts)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        base = parts.base
        plain: dict[str, Any] = {}
        if base.family.blocks is None:
            kinds = ["full_attention"] * parts.num_layers
            plain = {
                "attention_bias": bool(base.attention_biases),
                "position_embedding_type": "rope",
                # Of layers that it does not have: transformers wants the heads to divide their
                # width, and llama.cpp each key.
                "mamba_n_heads": 1,
                "mamba_d_head": 2 * base.sizes.hidden_size,
                "mamba_expand": 2,
                "mamba_n_groups": 1,
                "mamba_d_state": 256,
                "mamba_d_conv": 4,
                **base.multipliers._asdict(),
            }
        else:
            kinds = kinds_of(base.config, base.sizes)
        return {
            **plain,
            "layer_types": ["attention" if kind == "full_attention" else "mamba" for kind in kinds],
            "intermediate_size": parts.expert_width,
            "shared_intermediate_size": self.shared_width(parts),
            "num_local_experts": parts.num_experts,
            "num_experts_per_tok": parts.config.num_experts_per_tok,
        }


DEFAULTS_OF_GRANITE = {
    **DEFAULTS,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
DENSE = (
    DenseFamily("granite", DEFAULTS_OF_GRANITE, mlp_bias=True, multipliers=True),
    GraniteSwa(
        "granite_swa",
        {
            **DEFAULTS_OF_GRANITE,
            "bos_token_id": 100257,
            "eos_token_id": 100257,
            "layer_rope_theta": None,
            "layer_types": None,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "tie_word_embeddings": True,
        },
        mlp_bias=True,
        multipliers=True,
        class_name="GraniteSWAForCausalLM",
        windows="layer_types",
        full_attention=(4, 0),
        sinks=True,
    ),
    GraniteHybrid(
        "granitemoehybrid",
        {key: DEFAULTS_OF_HYBRID[key] for key in DEFAULTS_OF_HYBRID if key != "time_step_limit"},
        class_name="GraniteMoeHybridForCausalLM",
        biases=(),
        aliases={"layers_block_type": "layer_types"},
        names=((".mlp.down_proj.", ".shared_mlp.output_linear."),),
        fused=(("shared_mlp.input_linear", ("mlp.gate_proj", "mlp.up_proj")),),
        blocks=MAMBA,
    ),
)
MOE = (GraniteMoe(), GraniteMoeShared(), GraniteMoeSwa(), GraniteMoeHybrid())
EXPERTS = (
    ExpertAxis(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        block="block_sparse_moe",
        router="router.layer.weight",
        layouts=(Layout.FUSED,),
        stacked=GRANITE_STACKED,
    ),
    ExpertAxis(
        ("granitemoe_swa",),
        block="block_sparse_moe",
        router="router.weight",
        layouts=(Layout.FUSED,),
    ),
)
