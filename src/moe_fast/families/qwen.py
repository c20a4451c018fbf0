"""Qwen: Qwen2, Qwen3 and Qwen3.5, and these with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import CheckpointError
from moe_fast.families.config import Sizes
from moe_fast.families.dense import DEFAULTS, NORMS_BEFORE, QKV, QKVO, DenseFamily
from moe_fast.families.experts import WHOLE, ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    MoeFamily,
    Parts,
    Shapes,
    as_count,
    ffn_shapes,
    num_experts,
    shared_or_silent,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Twin, attention_shapes, read_kinds
from moe_fast.families.twins import Shapes as BlockShapes
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

QWEN_FUSED = (TRANSFORMERS_5, VLLM, LLAMA_CPP)


DEFAULTS_OF_QWEN_MOE: dict[str, Any] = {
    **DEFAULTS_OF_MOE,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32768,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


class Qwen(MoeFamily):
    """What Qwen2-MoE and Qwen3-MoE share."""

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": sorted(layers)}

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        step = as_count(config, "decoder_sparse_step", 1, minimum=1)
        listed = config.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            raise CheckpointError(
                f"mlp_only_layers is {brief(listed)}; it must list layers", file="config.json"
            )
        between = (layer for layer in range(num_layers) if (layer + 1) % step)
        return frozenset(between) | (frozenset(listed) & frozenset(range(num_layers)))

    def own_config(self, parts: Parts) -> dict[str, Any]:
        sizes, window = parts.base.sizes, parts.base.windows[0]
        return {
            **num_experts(parts),
            "moe_intermediate_size": parts.expert_width,
            **self.dense_keys(frozenset(parts.dense_layers), sizes.num_hidden_layers),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": sizes.num_hidden_layers if window is None else 0,
        }


class Qwen3Moe(Qwen):
    """Qwen3-MoE (Yang et al. 2025): norms on each head's queries and keys."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    mergekit_name = "qwen3 moe"
    auto_rank = 2
    rules = Rules(
        "num_experts",
        128,
        1e4,
        llama_cpp_normalises=True,
        llama_cpp_output_bias=False,
        either_count_key=True,
        fused=QWEN_FUSED,
    )
    defaults = DEFAULTS_OF_QWEN_MOE | {
        "attention_bias": False,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)
    attention_biases = ((), QKVO)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        biased = bool(parts.base.attention_biases)
        return {**super().own_config(parts), "attention_bias": biased}

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == VLLM and config.get("attention_bias"):
            yield f"leaves the bias of o_proj out of a {self.name}"


class GatedSharedExpert(MoeFamily):
    """A shared FFN whose output a sigmoid weighs; one that adds nothing where none is asked for."""

    shared_experts = True
    shared_gate = True
    # Divides among tensor-parallel ranks and fills a block of llama.cpp's quantisation.
    silent_width = 256

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        for role, weight in shared_or_silent(parts, layer, self.shared_width(parts)):
            yield f"mlp.shared_expert.{role}.weight", weight
        yield "mlp.shared_expert_gate.weight", parts.shared_gate(layer)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_expert_intermediate_size")
        shapes = ffn_shapes("mlp.shared_expert", width, hidden)
        return shapes | {"mlp.shared_expert_gate.weight": (1, hidden)}

    def shared_width(self, parts: Parts) -> int:
        width = parts.base.sizes.intermediate_size
        return len(parts.shared_experts) * width or min(self.silent_width, width)


class Qwen2Moe(GatedSharedExpert, Qwen):
    """Qwen2-MoE (Yang et al. 2024): biases on queries, keys and values, one gated shared FFN.

    A source without those biases gets zeros. Where no shared expert is asked for, the one that the
    family must have adds nothing.
    """

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"
    mergekit_name = "qwen moe"
    auto_rank = 3
    rules = Rules(
        "num_experts",
        60,
        1e4,
        llama_cpp_normalises=False,
        want_head=(LLAMA_CPP,),
        fused=QWEN_FUSED,
    )
    defaults = DEFAULTS_OF_QWEN_MOE | {
        "intermediate_size": 5632,
        "layer_types": None,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    }
    types: Mapping[str, str] = {"num_key_value_heads": "int | None"}
    dense_twin = "qwen2"
    attention_biases = ((), QKV)
    own_head_dim = False

    def twin_name(self, config: Mapping[str, Any]) -> str:
        return "qwen2" if config.get("qkv_bias", True) else "mistral"  # which has no biases

    def attention(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        for name, weight in parts.layer(layer):
            yield name, weight
            projection = name.removeprefix("self_attn.").removesuffix(".weight")
            if projection in QKV and not parts.base.attention_biases:
                bias = Weight.zeros(weight.dtype, weight.shape[:1])
                yield f"self_attn.{projection}.bias", bias

    def own_config(self, parts: Parts) -> dict[str, Any]:
        windows = parts.base.windows
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {
            **super().own_config(parts),
            "shared_expert_intermediate_size": self.shared_width(parts),
            "qkv_bias": True,
            "layer_types": kinds,
        }


DELTA = "gated delta networks"
# `layer_types` as the Hub and as transformers 5 have them.
KINDS = {"full_attention": "full_attention", "linear_attention": "linear_attention"}


class Qwen35(OwnBlocks):
    """Qwen3.5 (2026): in most layers a gated delta network (Yang et al. 2024), gated attention."""

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> BlockShapes:
        hidden = sizes.hidden_size
        step = as_count(config, "full_attention_interval", 4, minimum=1)
        default = [
            "linear_attention" if (n + 1) % step else "full_attention"
            for n in range(sizes.num_hidden_layers)
        ]
        norms: BlockShapes = {f"{norm}.weight": (hidden,) for norm in NORMS_BEFORE}
        if read_kinds(config, sizes, default, KINDS)[layer] == "full_attention":
            bias, own = config["attention_bias"], ("q_norm", "k_norm")
            return attention_shapes(sizes, bias=bias, norms=own, query_factor=2) | norms
        key_heads, heads, key, value = (
            as_count(config, f"linear_{name}", minimum=1)
            for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        )
        mixed = 2 * key_heads * key + heads * value
        return norms | {
            "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.conv1d.weight": (mixed, 1, as_count(config, "linear_conv_kernel_dim")),
            "linear_attn.in_proj_qkv.weight": (mixed, hidden),
            "linear_attn.in_proj_z.weight": (heads * value, hidden),
            "linear_attn.in_proj_a.weight": (heads, hidden),
            "linear_attn.in_proj_b.weight": (heads, hidden),
            "linear_attn.norm.weight": (value,),
            "linear_attn.out_proj.weight": (hidden, heads * value),
        }


DEFAULTS_OF_QWEN35: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": None,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class Qwen35Moe(GatedSharedExpert, Twin):
    """Qwen3.5-MoE: the blocks of Qwen3.5, with the experts of Qwen2-MoE."""

    name = "qwen3_5_moe_text"
    title = "Qwen3.5-MoE"
    architecture = "Qwen3_5MoeForCausalLM"
    auto_rank = 13
    rules = Rules(
        "num_experts",
        256,
        1e4,
        natively=(TRANSFORMERS_5, LLAMA_CPP),
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_QWEN35 | {
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
    }
    types: Mapping[str, str] = {"head_dim": "int"}
    dense_twin = "qwen3_5_text"
    also_read = ("full_attention_interval",)
    wrappers: Mapping[str, tuple[str, str]] = {
        "qwen3_5": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")
    }
    blocks = DELTA
    dropped = ("intermediate_size", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == LLAMA_CPP and config and not config.get("mtp_num_hidden_layers"):
            yield (
                f"wants layers that predict ahead in a {self.name}, unless its converter is given "
                "--no-mtp"
            )

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            "moe_intermediate_size": parts.expert_width,
            "shared_expert_intermediate_size": self.shared_width(parts),
            "num_experts": parts.num_experts,
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "router_aux_loss_coef": 0.001,
        }


DEFAULTS_OF_QWEN: dict[str, Any] = {
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
DENSE = (
    DenseFamily("qwen2", DEFAULTS_OF_QWEN, biases=QKV, windows="layer_types"),
    DenseFamily(
        "qwen3", {**DEFAULTS_OF_QWEN, "head_dim": 128}, qk_norm="head", windows="layer_types"
    ),
    Qwen35(
        "qwen3_5_text",
        DEFAULTS_OF_QWEN35,
        class_name="Qwen3_5ForCausalLM",
        biases=(),
        unread=("mtp.",),
        blocks=DELTA,
    ),
)
MOE = (Qwen3Moe(), Qwen2Moe(), Qwen35Moe())
EXPERTS = (
    ExpertAxis((*("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),)),
    # Its checkpoints hold each expert's matrices transposed.
    ExpertAxis(("qwen3_vl_moe", "qwen3_vl_moe_text"), layouts=(Layout.FUSED,), stacked=WHOLE),
)
