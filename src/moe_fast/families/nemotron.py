"""Nemotron-H: a layer is Mamba-2, attention, an FFN without a gate, or experts of such FFNs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import CheckpointError
from moe_fast.families.config import Sizes
from moe_fast.families.dense import FFN
from moe_fast.families.experts import BIAS, UP_DOWN, ExpertAxis
from moe_fast.families.glm import GroupedExperts
from moe_fast.families.moe import (
    ExpertTensor,
    Parts,
    as_count,
    biases_of,
    shared_or_silent,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Shapes, Twin, attention_shapes, read_kinds
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

BLOCKS = "layers of a single block each"
KINDS = {
    "mamba": "linear_attention",
    "linear_attention": "linear_attention",
    "attention": "full_attention",
    "full_attention": "full_attention",
    "mlp": "mlp",
    "moe": "moe",
}
# The same in `hybrid_override_pattern`, of older files.
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
UP, DOWN = FFN[1:]
NAMES = (
    ("model.embed_tokens.", "backbone.embeddings."),
    ("model.norm.", "backbone.norm_f."),
    ("model.layers.", "backbone.layers."),
    *((f".mlp.{role}.", f".mixer.{role}.") for role in (UP, DOWN)),
)
DEFAULTS_OF_NEMOTRON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 8,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 1e-4,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}


def listed_kinds(config: Mapping[str, Any]) -> Any:
    """What config.json says of the layers, in the spelling of lists."""
    pattern = config.get("hybrid_override_pattern")
    for key in ("layers_block_type", "layer_types"):
        if config.get(key) is not None:
            return config[key]
    if isinstance(pattern, str):
        return [LETTERS.get(letter, letter) for letter in pattern]
    return ["linear_attention", "moe", "full_attention", "mlp"]


def kinds_of(config: Mapping[str, Any]) -> list[str]:
    """What each layer is."""
    listed = listed_kinds(config)
    if not isinstance(listed, list) or not listed:
        raise CheckpointError(
            f"layers_block_type is {brief(listed)}; it must list a kind for each layer",
            file="config.json",
        )
    # As many as are listed, whatever num_hidden_layers says.
    sizes = Sizes(1, 1, 1, len(listed), 1, 1, 1)
    return read_kinds({"layer_types": listed}, sizes, (), KINDS)


class NemotronH(OwnBlocks):
    """Nemotron-H (NVIDIA 2025, arXiv 2504.03624).

    The same `model_type` is an MoE where some layers are `moe`.
    """

    def is_moe(self, config: Mapping[str, Any]) -> bool:
        kinds = listed_kinds(config)
        return isinstance(kinds, list) and "moe" in kinds

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kinds = kinds_of(config)
        own = {"layer_types": kinds, "num_hidden_layers": len(kinds)}
        old = ("hybrid_override_pattern", "layers_block_type")
        return super().with_defaults({k: v for k, v in config.items() if k not in old} | own)

    def of_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        kinds = ["mlp" if kind == "moe" else kind for kind in kinds_of(config)]
        return {"intermediate_size": width, "layers_block_type": kinds}

    def ffn_layers(self, sizes: Sizes, config: Mapping[str, Any]) -> Sequence[int]:
        return [n for n, kind in enumerate(kinds_of(config)) if kind in ("mlp", "moe")]

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        if "mlp" not in kinds_of(config):
            raise CheckpointError(
                "layers_block_type has no mlp, which experts are made of", file=file
            )
        return super().read_sizes(config, file)

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        hidden, kind = sizes.hidden_size, kinds_of(config)[layer]
        norm: Shapes = {"norm.weight": (hidden,)}
        if kind == "full_attention":
            named = attention_shapes(sizes).items()
            return norm | {name.replace("self_attn.", "mixer."): shape for name, shape in named}
        if kind != "linear_attention":
            return norm
        heads, size, groups, state, reach = (
            as_count(config, key, minimum=1)
            for key in (
                *("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
                "conv_kernel",
            )
        )
        inner = heads * size
        mixed = inner + 2 * groups * state
        shapes: Shapes = {
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "conv1d.weight": (mixed, 1, reach),
            "in_proj.weight": (inner + mixed + heads, hidden),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
        if config["use_conv_bias"]:
            shapes["conv1d.bias"] = (mixed,)
        if config["use_bias"]:
            shapes |= {"in_proj.bias": (inner + mixed + heads,), "out_proj.bias": (hidden,)}
        return norm | {f"mixer.{name}": shape for name, shape in shapes.items()}


class NemotronHMoe(GroupedExperts, Twin):
    """Nemotron 3 (NVIDIA 2025): experts in the layers that were FFNs, and a shared one beside them.

    The shared one adds nothing where none is asked for.
    """

    name = "nemotron_h"
    title = "Nemotron-H MoE"
    architecture = "NemotronHForCausalLM"
    auto_rank = 17
    rules = Rules(
        "n_routed_experts",
        8,
        1e4,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
    )
    defaults: Mapping[str, Any] = {
        **DEFAULTS_OF_NEMOTRON,
        "intermediate_size": 21504,
        "layers_block_type": None,
        "moe_intermediate_size": 7688,
        "moe_latent_size": None,
        "moe_shared_expert_intermediate_size": 7688,
        "moe_shared_expert_overlap": True,
        "mtp_layers_block_type": None,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
        "routed_scaling_factor": 1.0,
        "time_step_limit": (0.0, float("inf")),
        "topk_group": 1,
    }
    types: Mapping[str, str] = {
        "head_dim": "int",
        "mamba_proj_bias": "bool",
        "routed_scaling_factor": "float | int",
        "time_step_limit": "list[float] | tuple[float, ...]",
    }
    dense_twin = "nemotron_h"
    also_read = ("hybrid_override_pattern", "time_step_limit")
    blocks = BLOCKS
    names = NAMES
    block = "mixer"
    expert_names = ((UP, UP), (DOWN, DOWN))
    dropped = ("layer_types",)
    pads = False
    silent_width = 256

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        if layout is Layout.PER_EXPERT:
            return super().expert_tensors(layer, num_experts, layout)
        prefix = f"model.layers.{layer}.{self.block}.experts"
        return [
            ExpertTensor(f"{prefix}.{role}", tuple((e, role) for e in range(num_experts)), True)
            for role in (UP, DOWN)
        ]

    def effective_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kinds = kinds_of(config)
        own = {"layers_block_type": kinds, "num_hidden_layers": len(kinds)}
        return super().effective_config(config) | own

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        return {}  # `layers_block_type` says it

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        return frozenset(n for n, kind in enumerate(kinds_of(config)) if kind != "moe")

    def expert_input(self, config: Mapping[str, Any], hidden: int) -> int:
        """Experts may read a projection of the state."""
        latent = config.get("moe_latent_size")
        return hidden if latent is None else as_count(config, "moe_latent_size", minimum=1)

    def shared_width(self, parts: Parts) -> int:
        width = parts.base.sizes.intermediate_size
        return len(parts.shared_experts) * width or min(self.silent_width, width)

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield f"mixer.{BIAS}", Weight.zeros("F32", (parts.num_experts,))
        width = self.shared_width(parts)
        for role, weight in shared_or_silent(parts, layer, width, (UP, DOWN)):
            yield f"mixer.shared_experts.{role}.weight", weight

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        experts = as_count(config, "n_routed_experts", minimum=1)
        width, inner = (
            as_count(config, "moe_shared_expert_intermediate_size"),
            self.expert_input(config, hidden),
        )
        shapes: Shapes = {
            f"mixer.shared_experts.{UP}.weight": (width, hidden),
            f"mixer.shared_experts.{DOWN}.weight": (hidden, width),
        }
        if config.get("moe_latent_size") is not None:
            shapes["mixer.fc1_latent_proj.weight"] = (inner, hidden)
            shapes["mixer.fc2_latent_proj.weight"] = (hidden, inner)
        biases = biases_of(shapes) if config.get("mlp_bias") else {}
        return {f"mixer.{BIAS}": (experts,)} | shapes | biases

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == VLLM:
            yield f"has no experts without a gate, as in a {self.name}, on the processor"
        if reader != LLAMA_CPP:
            return
        if "mlp" in (config.get("layers_block_type") or ()):
            yield f"wants experts in every FFN of a {self.name}, some here are dense"
        if config.get("time_step_min", self.defaults["time_step_min"]) != 0:
            yield (
                f"does not look at time_step_min of a {self.name}; transformers takes no shorter "
                "steps"
            )
        if config.get("use_bias"):
            yield f"has no place for the biases of Mamba-2 layers in a {self.name}"
        if not config.get("use_conv_bias", True):
            yield f"wants a bias in the convolutions of a {self.name}"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        dense = frozenset(parts.dense_layers)
        kinds = enumerate(kinds_of(parts.base.config))
        return {
            **super().own_config(parts),
            "layers_block_type": [
                "moe" if kind == "mlp" and layer not in dense else kind for layer, kind in kinds
            ],
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": self.shared_width(parts),
            "moe_latent_size": None,
        }


DENSE = (
    NemotronH(
        "nemotron_h",
        DEFAULTS_OF_NEMOTRON,
        class_name="NemotronHForCausalLM",
        biases=(),
        mlp_bias=True,
        names=NAMES,
        unread=("mtp.",),
        gated=False,
        blocks=BLOCKS,
    ),
)
MOE = (NemotronHMoe(),)
EXPERTS = (
    ExpertAxis(
        ("nemotron_h",),
        block="mixer",
        counted=(BIAS,),
        copies_share="if normalised",
        parts=UP_DOWN,
        stacked={"experts.up_proj": ("up_proj",), "experts.down_proj": ("down_proj",)},
    ),
)
