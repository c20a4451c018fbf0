"""Dense models that are all headers: files of any size that take no room on the disk.

The data is one long hole, which reads as zeros.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from moe_fast.dtypes import ITEM_SIZES
from moe_fast.storage.safetensors_header import header_bytes

# How a program begins that builds from such models: few disks have room for what would come of it.
WITH_ROOM = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=10**15)
"""


def make_sparse_model(
    folder: Path,
    *,
    num_files: int = 1,
    num_hidden_layers: int = 2,
    hidden_size: int = 8192,
    intermediate_size: int = 28672,
    num_attention_heads: int = 64,
    num_key_value_heads: int = 8,
    vocab_size: int = 128_256,
    dtype: str = "BF16",
) -> int:
    """Write a Llama model whose weights are zeros, by default as wide as Llama 3 70B.

    Returns the bytes of its weights.
    """
    hidden, keys = hidden_size, hidden_size // num_attention_heads * num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden)}
    for layer in range(num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (intermediate_size, hidden),
                "mlp.up_proj": (intermediate_size, hidden),
                "mlp.down_proj": (hidden, intermediate_size),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "tie_word_embeddings": True,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes)
    weight_map, total = {}, 0
    for i in range(num_files):
        part = names[len(names) * i // num_files : len(names) * (i + 1) // num_files]
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        if num_files == 1:
            file = "model.safetensors"
        entries = [(n, dtype, shapes[n], math.prod(shapes[n]) * ITEM_SIZES[dtype]) for n in part]
        header = header_bytes(entries, {"format": "pt"})
        nbytes = sum(size for *_, size in entries)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + nbytes)
        weight_map |= dict.fromkeys(part, file)
        total += nbytes
    if num_files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
