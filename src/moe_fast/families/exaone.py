"""EXAONE 3.5, and EXAONE with experts, which Qwen3 becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.dense import DEFAULTS, DenseFamily
from moe_fast.families.experts import BIAS, ExpertAxis
from moe_fast.families.glm import GroupedExperts
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    LayerLists,
    Parts,
    Shapes,
    as_count,
    ffn_shapes,
    shared_or_silent,
    windows_as_qwen,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.storage.tensors import Weight

# The name of its bias for selection ends like those of others.
SELECTION = BIAS.removeprefix("gate.")
SLIDING = "sliding_attention"


class ExaoneMoe(LayerLists, GroupedExperts):
    """K-EXAONE (LG AI Research 2026): only layers with a sliding window rotate their heads.

    So all have one here, as wide as the context where the source has none.
    """

    name = "exaone_moe"
    title = "EXAONE-MoE"
    architecture = "ExaoneMoeForCausalLM"
    auto_rank = 24
    rules = Rules(
        "num_experts",
        64,
        1e4,
        llama_cpp_ropes=("default", "llama3"),
        llama_cpp_windows=True,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
        want_head=(LLAMA_CPP,),
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_MOE | {
        "bos_token_id": 1,
        "eos_token_id": 53,
        "first_k_dense_replace": 1,
        "intermediate_size": 16384,
        "layer_types": None,
        "mlp_layer_types": None,
        "moe_intermediate_size": 1024,
        "n_group": 1,
        "norm_topk_prob": True,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 32,
        "num_shared_experts": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "topk_group": 1,
    }
    types: Mapping[str, str] = {
        "mlp_layer_types": "list[str] | None",
        "sliding_window": "int",
        "sliding_window_pattern": "str | int | None",
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        first = GroupedExperts.dense_keys(self, layers, num_layers)  # where llama.cpp looks
        return super().dense_keys(layers, num_layers) | (first or {})

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        if config.get("mlp_layer_types") is None:
            return GroupedExperts.dense_layers(self, config, num_layers)
        return super().dense_layers(config, num_layers)

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().reader_problems(reader, config)
        if reader != LLAMA_CPP or not config:
            return
        kinds, first = config.get("mlp_layer_types"), config.get("first_k_dense_replace")
        dense = 1 if first is None else first
        if isinstance(kinds, list):
            dense = kinds.count("dense")
            if "dense" in kinds[dense:]:
                yield f"takes the first layers of an {self.name} for dense, here are others"
                return
        if (first or 0) != dense:
            yield f"looks for first_k_dense_replace, which is {first} for {dense} dense layers"

    def kept_for_dense(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return windows_as_qwen(config)

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield f"mlp.{SELECTION}", Weight.zeros("F32", (parts.num_experts,))
        for role, weight in shared_or_silent(parts, layer, parts.expert_width):
            yield f"mlp.shared_experts.{role}.weight", weight

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        number = as_count(config, "num_shared_experts", 1)
        width = number * as_count(config, "moe_intermediate_size")
        experts = as_count(config, "num_experts", minimum=1)
        return {f"mlp.{SELECTION}": (experts,)} | ffn_shapes("mlp.shared_experts", width, hidden)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        config = super().own_config(parts)
        longest = parts.base.config["max_position_embeddings"]
        window = parts.base.windows[0]
        return {
            **config,
            "num_experts": config.pop("n_routed_experts"),
            "num_shared_experts": config.pop("n_shared_experts"),
            "layer_types": [SLIDING] * parts.num_layers,
            "scoring_func": "sigmoid",  # which llama.cpp looks for
            "sliding_window": longest if window is None else window,
        }


DENSE = (
    DenseFamily(
        "exaone",
        {
            **DEFAULTS,
            "eos_token_id": 361,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
        },
        mlp_bias=True,
        class_name="LlamaForCausalLM",
        aliases={
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
            "num_layers": "num_hidden_layers",
        },
        names=(
            ("model.embed_tokens.", "transformer.wte."),
            ("model.norm.", "transformer.ln_f."),
            ("model.layers.", "transformer.h."),
            (".self_attn.o_proj.", ".attn.attention.out_proj."),
            (".self_attn.", ".attn.attention."),
            (".mlp.gate_proj.", ".mlp.c_fc_0."),
            (".mlp.up_proj.", ".mlp.c_fc_1."),
            (".mlp.down_proj.", ".mlp.c_proj."),
            (".input_layernorm.", ".ln_1."),
            (".post_attention_layernorm.", ".ln_2."),
        ),
    ),
)
MOE = (ExaoneMoe(),)
EXPERTS = (ExpertAxis(("exaone_moe",), counted=(SELECTION,), copies_share="if normalised"),)
