"""ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.dense import DEFAULTS, FFN, QKVO, DenseFamily
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import DEFAULTS_OF_MOE, MoeFamily, Parts, Shapes, as_count, ffn_shapes
from moe_fast.families.rules import LLAMA_CPP, Rules
from moe_fast.storage.tensors import Weight

STATISTICS = "moe_statics.e_score_correction_bias"
NOT_READ = ("attention_dropout", "num_experts_per_tok")


class Ernie(DenseFamily):
    """ERNIE 4.5 (Baidu 2025): Llama whose rotary embedding turns neighbours."""

    def ffn_bias_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return FFN if config["use_bias"] else ()


class ErnieMoe(MoeFamily):
    """ERNIE 4.5 with experts: a softmax, a bias for selection; queries and keys turn neighbours."""

    name = "ernie4_5_moe"
    title = "ERNIE-4.5-MoE"
    architecture = "Ernie4_5_MoeForCausalLM"
    auto_rank = 18
    rules = Rules(
        "moe_num_experts",
        64,
        5e5,
        llama_cpp_sentencepiece=True,
        llama_cpp_wants_sentencepiece=True,
    )
    defaults: Mapping[str, Any] = {
        **{key: value for key, value in DEFAULTS_OF_MOE.items() if key not in NOT_READ},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_norm_min": 1e-12,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "use_bias": False,
    }
    types: Mapping[str, str] = {
        "num_key_value_heads": "int | None",
        "output_router_logits": "bool | None",
        "router_aux_loss_coef": "float | None",
        "use_bias": "bool | None",
    }
    dense_twin = "ernie4_5"
    interleaved = True
    sliding_window = False
    shared_experts = True
    dense_places = "can leave the first layers dense, and the last ones, and no others"

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        sparse = sorted(frozenset(range(num_layers)) - layers)
        keys = {
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": 1,
        }
        return keys if self.dense_layers(keys, num_layers) == layers else None

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        first = as_count(config, "moe_layer_start_index", 1)
        step = as_count(config, "moe_layer_interval", 1, minimum=1)
        last = as_count(config, "moe_layer_end_index", -1, minimum=-1)
        last = num_layers - 1 if last == -1 else last
        return frozenset(n for n in range(num_layers) if (n + 1) % step or not first <= n <= last)

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader != LLAMA_CPP:
            return
        keys = ("moe_num_shared_experts", "moe_intermediate_size", "intermediate_size")
        counts = [config.get(key) for key in (*keys, "num_key_value_heads")]
        number, width, dense, heads = (n if type(n) is int and n > 0 else 0 for n in counts)
        if number and width and heads and dense // heads != number * width:
            yield (
                f"takes intermediate_size / num_key_value_heads, {dense // heads}, for the width "
                f"of a {self.name}'s shared experts, which is {number * width}"
            )
        last, layers = config.get("moe_layer_end_index", -1), config.get("num_hidden_layers")
        if last != -1 and isinstance(layers, int) and last != layers - 1:
            yield f"wants experts in the last layers of a {self.name}, they end at layer {last}"

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield f"mlp.{STATISTICS}", Weight.zeros("F32", (1, parts.num_experts))
        if parts.shared_experts:
            for role in FFN:
                yield f"mlp.shared_experts.{role}.weight", parts.shared_ffn(layer, role)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        shapes: Shapes = {f"mlp.{STATISTICS}": (1, as_count(config, "moe_num_experts", minimum=1))}
        number = as_count(config, "moe_num_shared_experts", 2)
        width = number * as_count(config, "moe_intermediate_size")
        return shapes | (ffn_shapes("mlp.shared_experts", width, hidden) if number else {})

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            "moe_num_experts": parts.num_experts,
            "moe_k": parts.config.num_experts_per_tok,
            "moe_intermediate_size": parts.expert_width,
            "moe_num_shared_experts": len(parts.shared_experts) * parts.granularity,
            **(self.dense_keys(frozenset(parts.dense_layers), parts.num_layers) or {}),
            "moe_norm_min": 1e-12,
            "use_bias": False,
            "router_aux_loss_coef": 0.001,
        }


DENSE = (
    Ernie(
        "ernie4_5",
        {
            **DEFAULTS,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        class_name="Ernie4_5ForCausalLM",
        bias_keys={"use_bias": QKVO},
        interleaved=True,
    ),
)
MOE = (ErnieMoe(),)
EXPERTS = (ExpertAxis(("ernie4_5_moe",), counted=(STATISTICS,), copies_share="never"),)
