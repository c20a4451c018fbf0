"""DeepSeek-MoE, whose dense twin is Llama, and DeepSeek-V3, whose dense twin is Youtu-LLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.families.config import Sizes
from moe_fast.families.dense import FFN, NORMS_BEFORE
from moe_fast.families.experts import BIAS, ExpertAxis
from moe_fast.families.glm import LatentExperts
from moe_fast.families.moe import DEFAULTS_OF_MOE, MoeFamily, Parts, Shapes, as_count, ffn_shapes
from moe_fast.families.rules import LLAMA_CPP, VLLM, Rules
from moe_fast.families.twins import LATENT, OwnBlocks
from moe_fast.storage.tensors import Weight


class DeepSeek(MoeFamily):
    """DeepSeek-MoE, the first version (Dai et al. 2024): shared experts added to the routed ones.

    transformers reads it with the code that DeepSeek keeps on the Hub.
    """

    name = "deepseek"
    title = "DeepSeek-MoE"
    architecture = "DeepseekForCausalLM"
    mergekit_name = "deepseek moe"
    auto_rank = 7
    rules = Rules(
        "n_routed_experts",
        0,
        1e4,
        llama_cpp_normalises=False,
        llama_cpp_ropes=("default",),
        llama_cpp_sentencepiece=True,
        want_head=(VLLM,),
        natively=(VLLM, LLAMA_CPP),
        fused=(),
    )
    defaults: Mapping[str, Any] = {
        **{key: value for key, value in DEFAULTS_OF_MOE.items() if key != "head_dim"},
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "moe_layer_freq": 1,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "norm_topk_prob": False,
        "num_experts_per_tok": None,
        "num_key_value_heads": 32,
        "scoring_func": "softmax",
    }
    """Those of DeepSeek's own code."""
    dense_twin = "llama"
    layouts = (Layout.PER_EXPERT,)
    own_head_dim = False
    sliding_window = False
    rope_types = ("default", "linear", "dynamic")
    shared_experts = True
    dense_places = (
        "can leave the first layers dense, and of those after them all but every n-th, not these"
    )

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        first = min(frozenset(range(num_layers)) - layers)
        for step in range(1, num_layers + 1):
            keys = {"first_k_dense_replace": first, "moe_layer_freq": step}
            if self.dense_layers(keys, num_layers) == layers:
                return keys
        return None

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        first = as_count(config, "first_k_dense_replace", 0)
        step = as_count(config, "moe_layer_freq", 1, minimum=1)
        return frozenset(n for n in range(num_layers) if n < first or n % step)

    def warnings(self, parts: Parts) -> list[str]:
        if parts.config.num_experts_per_tok > 1:
            return []
        return [
            "num_experts_per_tok 1: DeepSeek-MoE leaves the weight of a single expert as it is, so "
            "that each FFN's output shrinks to that share until training makes up for it"
        ]

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        if parts.shared_experts:
            for role in FFN:
                yield f"mlp.shared_experts.{role}.weight", parts.shared_ffn(layer, role)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        if config.get("n_shared_experts") is None:
            return {}
        number = as_count(config, "n_shared_experts", 0)
        width = number * as_count(config, "moe_intermediate_size")
        return ffn_shapes("mlp.shared_experts", width, hidden)

    def config(self, parts: Parts) -> dict[str, Any]:
        config = super().config(parts)
        if config["rope_scaling"] is not None:  # Its code takes exactly these two keys.
            scaling = config["rope_scaling"]
            config["rope_scaling"] = {"type": scaling["rope_type"], "factor": scaling["factor"]}
        return config

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == LLAMA_CPP:
            if config.get("moe_layer_freq", 1) != 1:
                yield "does not look at moe_layer_freq, and would look for experts in dense layers"
            if not config.get("n_shared_experts"):
                yield "wants a shared expert in a deepseek, here is none"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        code = "deepseek-ai/deepseek-moe-16b-base"
        layers = frozenset(parts.dense_layers)
        return {
            "n_routed_experts": parts.num_experts,
            # DeepSeek's code makes an FFN of width 0 where it is 0, and dividing by that ends vLLM.
            "n_shared_experts": len(parts.shared_experts) or None,
            "moe_intermediate_size": parts.expert_width,
            **(self.dense_keys(layers, parts.num_layers) or {}),
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "attention_bias": False,
            "pretraining_tp": 1,
            "auto_map": {
                "AutoConfig": f"{code}--configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{code}--modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{code}--modeling_deepseek.DeepseekForCausalLM",
            },
        }


class Youtu(OwnBlocks):
    """Youtu-LLM (Tencent 2025): latent attention (DeepSeek-V2, 2405.04434) in a dense model."""

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        hidden, heads = sizes.hidden_size, sizes.num_attention_heads
        latent, rotated, plain, value = (
            as_count(config, key, minimum=1)
            for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        queries = heads * (rotated + plain)
        shapes: Shapes = {
            "kv_a_proj_with_mqa.weight": (latent + rotated, hidden),
            "kv_a_layernorm.weight": (latent,),
            "kv_b_proj.weight": (heads * (plain + value), latent),
            "o_proj.weight": (hidden, heads * value),
        }
        biased = ["kv_a_proj_with_mqa", "o_proj"]
        if config["q_lora_rank"] is None:
            shapes["q_proj.weight"] = (queries, hidden)
        else:
            rank = as_count(config, "q_lora_rank", minimum=1)
            shapes |= {"q_a_proj.weight": (rank, hidden), "q_a_layernorm.weight": (rank,)}
            shapes["q_b_proj.weight"] = (queries, rank)
            biased.append("q_a_proj")
        if config["attention_bias"]:
            shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}
        found = {f"self_attn.{name}": shape for name, shape in shapes.items()}
        return found | {f"{norm}.weight": (hidden,) for norm in NORMS_BEFORE}


class DeepSeekV3(LatentExperts):
    """DeepSeek-V3 (2412.19437)."""

    name = "deepseek_v3"
    title = "DeepSeek-V3"
    architecture = "DeepseekV3ForCausalLM"
    auto_rank = 15
    rules = Rules(
        "n_routed_experts",
        256,
        1e4,
        llama_cpp_ropes=("default",),
    )
    defaults: Mapping[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 128,
        "num_mtp_layers": 1,
        "output_router_logits": False,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "use_cache": True,
        "v_head_dim": 128,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float | int | None",
        "first_k_dense_replace": "int | None",
        "n_group": "int | None",
        "norm_topk_prob": "bool | None",
        "num_experts_per_tok": "int | None",
        "num_key_value_heads": "int | None",
        "pretraining_tp": "int | None",
        "topk_group": "int | None",
    }

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **super().own_config(parts),
            # vLLM has a bias of selection where these say so.
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }


DENSE = (
    Youtu(
        "youtu",
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "hidden_act": "silu",
            "initializer_range": None,
            "kv_lora_rank": 512,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 16,
            "pad_token_id": None,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope_interleave": True,
            "tie_word_embeddings": True,
            "use_cache": True,
            "v_head_dim": 128,
        },
        biases=(),
        blocks=LATENT,
    ),
)
MOE = (DeepSeek(), DeepSeekV3())
EXPERTS = (
    ExpertAxis(("deepseek",), layouts=(Layout.PER_EXPERT,)),
    ExpertAxis(("deepseek_v2",)),
    ExpertAxis(("deepseek_v3", "deepseek_v32"), counted=(BIAS,), copies_share="if normalised"),
)
