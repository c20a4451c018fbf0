"""LFM2, dense and with experts: short convolutions, and attention in some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import Sizes, is_count, is_number
from moe_fast.families.experts import W1_W3_W2, ExpertAxis
from moe_fast.families.moe import Parts, as_count
from moe_fast.families.moe import Shapes as MoeShapes
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Shapes, Twin, attention_shapes, read_kinds
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

CONVOLUTIONS = "short convolutions"
NAMES = (
    ("model.norm.", "model.embedding_norm."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
)


class Lfm2(OwnBlocks):
    """LFM2 (Liquid AI 2025)."""

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        """Where `block_auto_adjust_ff_dim`, the FFN is two thirds as wide, and rounded up."""
        sizes = super().read_sizes(config, file)
        if not config["block_auto_adjust_ff_dim"]:
            return sizes
        factor, multiple = config["block_ffn_dim_multiplier"], config["block_multiple_of"]
        if not is_number(factor) or not factor > 0 or not is_count(multiple):
            raise CheckpointError(
                f"block_ffn_dim_multiplier is {brief(factor)}, block_multiple_of "
                f"{brief(multiple)}; they must be a positive number and an integer of at least 1",
                file=file,
            )
        width = int(factor * int(2 * sizes.intermediate_size / 3))
        return replace(sizes, intermediate_size=-(-width // multiple) * multiple)

    def of_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        return {"intermediate_size": width, "block_auto_adjust_ff_dim": False}

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        hidden, layers = sizes.hidden_size, range(sizes.num_hidden_layers)
        listed = config.get("full_attn_idxs")
        attending = listed if isinstance(listed, list) else layers
        default = ["full_attention" if each in attending else "conv" for each in layers]
        kind = read_kinds(config, sizes, default, {kind: kind for kind in KINDS})[layer]
        norms: Shapes = {"operator_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        if kind == "full_attention":
            names = ("q_proj", "k_proj", "v_proj", "out_proj")
            own = ("q_layernorm", "k_layernorm")
            return attention_shapes(sizes, names=names, norms=own) | norms
        reach = as_count(config, "conv_L_cache", minimum=1)
        shapes: Shapes = {
            "conv.conv.weight": (hidden, 1, reach),
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.out_proj.weight": (hidden, hidden),
        }
        if config["conv_bias"]:
            shapes |= {f"{name.removesuffix('weight')}bias": s[:1] for name, s in shapes.items()}
        return shapes | norms


KINDS = ("full_attention", "conv")


class Lfm2Moe(Twin):
    """LFM2 with experts: sigmoid scores, a bias for selection."""

    name = "lfm2_moe"
    title = "LFM2-MoE"
    architecture = "Lfm2MoeForCausalLM"
    auto_rank = 10
    rules = Rules(
        "num_experts",
        32,
        1e6,
        llama_cpp_ropes=("default",),
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
    )
    defaults: Mapping[str, Any] = {
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "intermediate_size": 7168,
        "layer_types": None,
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1792,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "output_router_logits": False,
        "pad_token_id": 0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_expert_bias": True,
    }
    dense_twin = "lfm2"
    blocks = CONVOLUTIONS
    names = NAMES
    block = "feed_forward"
    expert_names = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    scaling_key = "routed_scaling_factor"
    dense_places = "can leave the first layers dense, and no others"
    dropped = (
        *("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
        *("block_ff_dim", "full_attn_idxs", "block_dim", "block_mlp_init_scale"),
    )

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        first = len(layers)
        return {"num_dense_layers": first} if layers == frozenset(range(first)) else None

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        return frozenset(range(min(as_count(config, "num_dense_layers", 2), num_layers)))

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield "feed_forward.expert_bias", Weight.zeros("F32", (parts.num_experts,))

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> MoeShapes:
        experts = as_count(config, "num_experts", minimum=1)
        return {"feed_forward.expert_bias": (experts,)} if config["use_expert_bias"] else {}

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if config.get("tie_word_embeddings", True):
            return
        if reader == VLLM:
            yield f"takes the embedding for the head of a {self.name}"
        if reader == LLAMA_CPP:
            yield f"has no place for a head of its own in a {self.name}"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        base = parts.base
        attending = [
            "self_attn.q_proj.weight" in dict(base.layer(layer))
            for layer in range(base.sizes.num_hidden_layers)
        ]
        return {
            "layer_types": [KINDS[0] if attends else KINDS[1] for attends in attending],
            "intermediate_size": base.sizes.intermediate_size,
            "moe_intermediate_size": parts.expert_width,
            **(self.dense_keys(frozenset(parts.dense_layers), parts.num_layers) or {}),
            "num_experts": parts.num_experts,
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(parts.granularity),
            "use_expert_bias": True,
        }


DENSE = (
    Lfm2(
        "lfm2",
        {
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "bos_token_id": 1,
            "conv_L_cache": 3,
            "conv_bias": False,
            "eos_token_id": 2,
            "full_attn_idxs": None,
            "initializer_range": 0.02,
            "layer_types": None,
            "max_position_embeddings": 128000,
            "norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
        biases=(),
        aliases={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        names=NAMES,
        blocks=CONVOLUTIONS,
    ),
)
MOE = (Lfm2Moe(),)
EXPERTS = (
    ExpertAxis(
        ("lfm2_moe",),
        block="feed_forward",
        counted=("expert_bias",),
        copies_share="if normalised",
        parts=W1_W3_W2,
    ),
)
