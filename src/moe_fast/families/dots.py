"""dots.llm1, which Qwen3 becomes where groups of experts and sliding windows are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.dense import QKVO
from moe_fast.families.experts import BIAS, ExpertAxis
from moe_fast.families.glm import GroupedExperts
from moe_fast.families.moe import DEFAULTS_OF_MOE, Parts, windows_as_qwen
from moe_fast.families.rules import LLAMA_CPP, Rules


class Dots1(GroupedExperts):
    """dots.llm1 (Huo et al. 2025, arXiv 2506.05767)."""

    name = "dots1"
    title = "dots.llm1"
    architecture = "Dots1ForCausalLM"
    auto_rank = 19
    # vLLM by transformers' classes.
    rules = Rules(
        "n_routed_experts", None, 1e4, want_head=(LLAMA_CPP,), llama_cpp_output_bias=False
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_MOE | {
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "intermediate_size": 10944,
        "layer_types": None,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "norm_topk_prob": False,
        "num_experts_per_tok": None,
        "num_key_value_heads": 32,
        "routed_scaling_factor": 1.0,
        "sliding_window": 4096,
        "topk_group": 1,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float | int | None",
        "first_k_dense_replace": "int | None",
        "max_window_layers": "int | None",
        "n_group": "int | None",
        "n_routed_experts": "int | None",
        "n_shared_experts": "int | None",
        "norm_topk_prob": "bool | None",
        "num_experts_per_tok": "int | None",
        "num_key_value_heads": "int | None",
        "topk_group": "int | None",
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)
    attention_biases = ((), QKVO)
    unlike_windows = True

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader != LLAMA_CPP:
            return
        heads, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if heads != keys:
            yield f"wants as many heads of keys as of queries in a {self.name}: {keys}, {heads}"

    def kept_for_dense(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return windows_as_qwen(config)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        windows = parts.base.windows
        widths = [width for width in windows if width is not None]
        return {
            **super().own_config(parts),
            "attention_bias": bool(parts.base.attention_biases),
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
            "sliding_window": widths[0] if widths else None,
            "max_window_layers": len(windows),
            "scoring_func": "sigmoid",  # which llama.cpp looks for
        }


MOE = (Dots1(),)
EXPERTS = (ExpertAxis(("dots1",), counted=(BIAS,), copies_share="if normalised"),)
