"""Gemma 1 and VaultGemma, and Gemma 4 with the experts that stand beside the FFN of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import CheckpointError
from moe_fast.families.config import Multipliers, Sizes, is_number
from moe_fast.families.dense import DEFAULTS, FFN, DenseFamily
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import ExpertTensor, Parts, as_count, ffn_shapes, stacks
from moe_fast.families.moe import Shapes as MoeShapes
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Shapes, Twin, attention_shapes, read_kinds
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

BLOCKS = "blocks of Gemma 4"
KINDS = ("sliding_attention", "full_attention")
NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
BEFORE_EXPERTS = "pre_feedforward_layernorm_2.weight"
AFTER = tuple(f"post_feedforward_layernorm_{branch}.weight" for branch in (1, 2))
DEFAULTS_OF_GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 256,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layer_types": None,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 262144,
}


class Gemma4(OwnBlocks):
    """Gemma 4 (2026): norms around attention and FFN, an embedding for each layer.

    The same `model_type` is an MoE where `enable_moe_block`.
    """

    def is_moe(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("enable_moe_block"))

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        if config["use_double_wide_mlp"] and config["num_kv_shared_layers"]:
            raise CheckpointError(
                "use_double_wide_mlp makes the FFN of some layers twice as wide; experts have one "
                "width in all layers",
                file=file,
            )
        return super().read_sizes(config, file)

    def outer_shapes(self, sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
        shapes = super().outer_shapes(sizes, config)
        width = as_count(config, "hidden_size_per_layer_input")
        if width:
            rows, all_layers = (
                as_count(config, "vocab_size_per_layer_input", minimum=1),
                width * sizes.num_hidden_layers,
            )
            shapes |= {
                "model.embed_tokens_per_layer.weight": (rows, all_layers),
                "model.per_layer_model_projection.weight": (all_layers, sizes.hidden_size),
                "model.per_layer_projection_norm.weight": (width,),
            }
        return shapes

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        hidden, layers = sizes.hidden_size, sizes.num_hidden_layers
        default = [KINDS[(n + 1) % 6 == 0 or n + 1 == layers] for n in range(layers)]
        full = read_kinds(config, sizes, default, {k: k for k in KINDS})[layer] == KINDS[1]
        shapes = attention_shapes(
            self.sizes_of_attention(sizes, config, layer, full),
            bias=config["attention_bias"],
            norms=("q_norm", "k_norm"),
        )
        absent = []
        if full and config["attention_k_eq_v"]:
            absent = ["v_proj"]
        if layer >= layers - as_count(config, "num_kv_shared_layers"):
            absent = ["k_proj", "v_proj", "k_norm"]
        shapes = {n: s for n, s in shapes.items() if n.split(".")[1] not in absent}
        shapes |= {f"{norm}.weight": (hidden,) for norm in NORMS} | {"layer_scalar": (1,)}
        width = as_count(config, "hidden_size_per_layer_input")
        if width:
            shapes |= {
                "per_layer_input_gate.weight": (width, hidden),
                "per_layer_projection.weight": (hidden, width),
                "post_per_layer_input_norm.weight": (hidden,),
            }
        return shapes

    def sizes_of_attention(
        self, sizes: Sizes, config: Mapping[str, Any], layer: int, full: bool
    ) -> Sizes:
        """Full attention may have heads of its own, in the spelling of the Hub or of 5.24."""
        own = config.get("per_layer_config")
        if isinstance(own, dict):
            own = own.get(str(layer))
        elif full:
            own = {"head_dim": config.get("global_head_dim", 512)}
            if config["attention_k_eq_v"] and config.get("num_global_key_value_heads"):
                own["num_key_value_heads"] = config["num_global_key_value_heads"]
        else:
            own = {}
        own = own if isinstance(own, dict) else {}
        named = {key: own.get(key) for key in ("head_dim", "num_key_value_heads")}
        changes = {key: as_count(named, key, minimum=1) for key in named if named[key] is not None}
        return replace(sizes, **changes)


class Gemma4Moe(Twin):
    """Gemma 4 with experts.

    The dense FFN stays where it is, and copies of it beside it: their outputs, each normalised, are
    added up, and the norm that follows takes the factor of 2 away.
    """

    name = "gemma4_text"
    title = "Gemma 4 MoE"
    architecture = "Gemma4ForCausalLM"
    auto_rank = 16
    rules = Rules(
        "num_experts",
        None,
        1e4,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
        llama_cpp_windows=True,
        per_expert=(),
        fused=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_GEMMA
    types: Mapping[str, str] = {
        "attention_dropout": "int | float | None",
        "head_dim": "int",
        "moe_intermediate_size": "int | None",
        "num_experts": "int | None",
        "sliding_window": "int",
    }
    dense_twin = "gemma4_text"
    also_read = ("per_layer_config", "global_head_dim", "num_global_key_value_heads")
    wrappers: Mapping[str, tuple[str, str]] = {
        "gemma4": ("gemma4", "Gemma4ForConditionalGeneration")
    }
    blocks = BLOCKS
    layouts = (Layout.FUSED,)

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        prefix = f"model.layers.{layer}.experts"
        return stacks(f"{prefix}.gate_up_proj", f"{prefix}.down_proj", range(num_experts))

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.router.proj.weight"

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        kept = dict(parts.layer(layer))
        before = kept["pre_feedforward_layernorm.weight"]
        yield "router.scale", Weight.filled(parts.dtype, before.shape, 1.0)
        yield "router.per_expert_scale", Weight.filled(parts.dtype, (parts.num_experts,), 1.0)
        for role in FFN:
            yield f"mlp.{role}.weight", parts.dense_ffn(layer, role)
        yield BEFORE_EXPERTS, before
        for name in AFTER:
            yield name, Weight.filled(before.dtype, before.shape, 1.0)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> MoeShapes:
        norms = dict.fromkeys((BEFORE_EXPERTS, *AFTER, "router.scale"), (hidden,))
        experts = as_count(config, "num_experts", minimum=1)
        shapes = ffn_shapes("mlp", as_count(config, "intermediate_size"), hidden)
        return {**shapes, **norms, "router.per_expert_scale": (experts,)}

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            "enable_moe_block": True,
            "moe_intermediate_size": parts.expert_width,
            "num_experts": parts.num_experts,
            "top_k_experts": parts.config.num_experts_per_tok,
        }


class Gemma(DenseFamily):
    """Gemma 1 (Gemma Team 2024): Llama, its embedding multiplied, its norms' weights less 1."""

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Its first files say "gelu" and mean the other one."""
        found = super().with_defaults(config)
        if found["hidden_act"] == "gelu":
            found["hidden_act"] = "gelu_pytorch_tanh"
        return found

    def read_multipliers(self, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
        return Multipliers(sizes.hidden_size**0.5, sizes.head_dim**-0.5, 1.0, 1.0)

    def reservations(self, config: Mapping[str, Any], dtype: str) -> Iterator[str]:
        if dtype != "F32":
            yield (
                "norms are weights plus 1, in float32 unless a dtype is asked for: where they are "
                "rounded to 16 bits, the output computes what its source does only to that rounding"
            )


class VaultGemma(Gemma):
    """VaultGemma (Sinha et al. 2025): Gemma 1 with sliding windows."""

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config[key] is not None:
                raise CheckpointError(
                    f"{key} is {brief(config[key])}; no MoE of such blocks caps them", file=file
                )
        return super().read_sizes(config, file)

    def read_multipliers(self, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
        scale = config["query_pre_attn_scalar"]
        if not is_number(scale) or not scale > 0:
            raise CheckpointError(
                f"query_pre_attn_scalar is {brief(scale)}; it must be a positive number",
                file="config.json",
            )
        return super().read_multipliers(config, sizes)._replace(attention_multiplier=scale**-0.5)


DEFAULTS_OF_GEMMA_1: dict[str, Any] = {
    **DEFAULTS,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
DENSE = (
    Gemma(
        "gemma",
        {**DEFAULTS_OF_GEMMA_1, "num_key_value_heads": 16, "use_bidirectional_attention": None},
        multipliers=True,
        norm_shift=1.0,
    ),
    VaultGemma(
        "vaultgemma",
        {
            **DEFAULTS_OF_GEMMA_1,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "layer_types": None,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        class_name="VaultGemmaForCausalLM",
        multipliers=True,
        norm_shift=1.0,
        aliases={"hidden_activation": "hidden_act"},
        names=((".post_attention_layernorm.", ".pre_feedforward_layernorm."),),
        windows="layer_types",
        full_attention=(2, 1),
    ),
    Gemma4(
        "gemma4_text",
        {key: DEFAULTS_OF_GEMMA[key] for key in DEFAULTS_OF_GEMMA if key != "intermediate_size"},
        class_name="Gemma4ForCausalLM",
        biases=(),
        blocks=BLOCKS,
        runs_by_layer=False,
    ),
)
MOE = (Gemma4Moe(),)
EXPERTS = (
    ExpertAxis(
        ("gemma4", "gemma4_text"),
        block="",
        router="router.proj.weight",
        counted=("router.per_expert_scale",),
        layouts=(Layout.FUSED,),
    ),
)
