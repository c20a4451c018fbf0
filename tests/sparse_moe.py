"""A sparse DeepSeek-V3: all of its headers, and holes for weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from moe_fast.storage.safetensors_header import header_bytes

Entry = tuple[str, str, tuple[int, ...]]
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def make_sparse_moe(
    folder: Path,
    *,
    fp8: bool = False,
    num_files: int = 163,
    num_hidden_layers: int = 61,
    num_experts: int = 256,
    hidden_size: int = 7168,
    moe_intermediate_size: int = 2048,
) -> int:
    """Write it, by default with the sizes of DeepSeek-V3; return the bytes of its weights."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129_280,
        "hidden_size": hidden_size,
        "intermediate_size": 18_432,
        "moe_intermediate_size": moe_intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "tie_word_embeddings": False,
    }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(entries(config, fp8))
    weight_map, total = {}, 0
    for i in range(num_files):
        part = tensors[len(tensors) * i // num_files : len(tensors) * (i + 1) // num_files]
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        sizes = [(n, d, s, math.prod(s) * BYTES[d]) for n, d, s in part]
        header = header_bytes(sizes, {"format": "pt"})
        nbytes = sum(size for *_, size in sizes)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + nbytes)
        weight_map |= dict.fromkeys((name for name, *_ in part), file)
        total += nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def entries(config: dict[str, object], fp8: bool) -> Iterator[Entry]:
    """Name, dtype and shape of each tensor."""
    hidden, inner, experts = (
        int(str(config[key]))
        for key in ("hidden_size", "moe_intermediate_size", "n_routed_experts")
    )

    def matrix(name: str, rows: int, columns: int) -> Iterator[Entry]:
        if not fp8:
            yield f"{name}.weight", "BF16", (rows, columns)
            return
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))

    def network(prefix: str, width: int) -> Iterator[Entry]:
        yield from matrix(f"{prefix}.gate_proj", width, hidden)
        yield from matrix(f"{prefix}.up_proj", width, hidden)
        yield from matrix(f"{prefix}.down_proj", hidden, width)

    yield "model.embed_tokens.weight", "BF16", (129_280, hidden)
    for layer in range(int(str(config["num_hidden_layers"]))):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", "BF16", (hidden,)
        yield from matrix(f"{block}.self_attn.q_a_proj", 1536, hidden)
        yield f"{block}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield from matrix(f"{block}.self_attn.q_b_proj", 128 * 192, 1536)
        yield from matrix(f"{block}.self_attn.kv_a_proj_with_mqa", 576, hidden)
        yield f"{block}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from matrix(f"{block}.self_attn.kv_b_proj", 128 * 256, 512)
        yield from matrix(f"{block}.self_attn.o_proj", hidden, 128 * 128)
        yield f"{block}.post_attention_layernorm.weight", "BF16", (hidden,)
        if layer < 3:
            yield from network(f"{block}.mlp", 18_432)
            continue
        yield f"{block}.mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{block}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from network(f"{block}.mlp.shared_experts", inner)
        for expert in range(experts):
            yield from network(f"{block}.mlp.experts.{expert}", inner)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (129_280, hidden)
