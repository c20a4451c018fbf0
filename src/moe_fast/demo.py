"""Small dense models to try things on, and an MoE made from two: random weights, real files."""

from __future__ import annotations

import json
import os

import numpy as np

from moe_fast.checkpoint.build import BuildReport, build_moe
from moe_fast.checkpoint.check import CheckReport, check_moe
from moe_fast.checkpoint.output import MARKS, Writing, find_obstacles
from moe_fast.checks import as_index, as_path
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.single_file import whole_file
from moe_fast.storage.safetensors_header import header_bytes
from moe_fast.storage.staging import is_vacant, staged
from moe_fast.storage.tensors import FORMAT

__all__ = ["make_demo", "make_dense_model"]

DENSE = ("dense-a", "dense-b")
MOE = "moe"


def make_demo(
    folder: str | os.PathLike[str], *, overwrite: bool = False
) -> tuple[BuildReport, CheckReport]:
    """Make two dense models, `dense-a` and `dense-b`, build `moe` from them, and check it.

    Parameters
    ----------
    folder : path
        The folder in which the three are created.
    overwrite : bool
        Whether to replace models of these names.

    Returns
    -------
    BuildReport, CheckReport
        The reports of the build and of its check.

    Raises
    ------
    CheckpointError
        If a model exists or cannot be written. Nothing has been written then.
    OSError
        If the disk is full.

    Examples
    --------
    >>> from moe_fast import make_demo
    >>> import tempfile
    >>> built, checked = make_demo(tempfile.mkdtemp())
    >>> built.num_experts, checked.passed
    (8, True)
    """
    folder = as_path(folder, "folder")
    places = [folder / name for name in (*DENSE, MOE)]
    there = [place.name for place in places if folder.is_dir() and not is_vacant(place)]
    if there and not overwrite:
        raise CheckpointError(
            f"has {', '.join(there)} already; use them, choose another folder, or "
            "recreate them: --overwrite, in Python overwrite=True",
            file=folder,
        )
    problems = [
        p for place in places for p in find_obstacles(place, (), Writing(overwrite=overwrite))
    ]
    if problems:
        raise CheckpointError(*problems)
    for seed, place in enumerate(places[:-1]):
        with staged(place, f"{seed:064}", overwrite=overwrite, marks=MARKS) as growing:
            make_dense_model(growing, seed=seed)
    built = build_moe(places[:-1], places[-1], overwrite=overwrite)
    return built, check_moe(places[-1])


def make_dense_model(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
) -> None:
    """Write a Llama model with seeded random float32 weights and a tokenizer of single bytes.

    It has 4 attention heads, 2 key-value heads, and tied embeddings of 256 tokens, one per byte.

    Parameters
    ----------
    folder : path
        The folder to write to. Files of an earlier model in it are replaced.
    seed : int
        The seed of the weights, at least 0.
    hidden_size, intermediate_size, num_hidden_layers : int
        The shape of the model; `hidden_size` must be a multiple of 8.

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.
    OSError
        If a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from moe_fast import inspect_model, make_dense_model
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(folder, seed=0, hidden_size=32)
    >>> inspect_model(folder).num_parameters
    39072
    """
    folder = as_path(folder, "folder")
    seed = as_index(seed, "seed")
    hidden_size = as_index(hidden_size, "hidden_size", minimum=8)
    if hidden_size % 8:  # rotary embeddings turn pairs in each of 4 heads
        raise MoeConfigError(f"must be a multiple of 8, got {hidden_size}", argument="hidden_size")
    intermediate_size = as_index(intermediate_size, "intermediate_size", minimum=1)
    num_hidden_layers = as_index(num_hidden_layers, "num_hidden_layers", minimum=1)
    generator = np.random.Generator(np.random.PCG64(seed))

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(scale=0.05, size=shape).astype(np.float32)

    keys = hidden_size // 2
    tensors = {
        "model.embed_tokens.weight": normal(256, hidden_size),
        "model.norm.weight": np.ones(hidden_size, np.float32),
    }
    for layer in range(num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": np.ones(hidden_size, np.float32),
            f"{prefix}.self_attn.q_proj.weight": normal(hidden_size, hidden_size),
            f"{prefix}.self_attn.k_proj.weight": normal(keys, hidden_size),
            f"{prefix}.self_attn.v_proj.weight": normal(keys, hidden_size),
            f"{prefix}.self_attn.o_proj.weight": normal(hidden_size, hidden_size),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden_size, np.float32),
            f"{prefix}.mlp.gate_proj.weight": normal(intermediate_size, hidden_size),
            f"{prefix}.mlp.up_proj.weight": normal(intermediate_size, hidden_size),
            f"{prefix}.mlp.down_proj.weight": normal(hidden_size, intermediate_size),
        }
    entries = [(name, "F32", array.shape, array.nbytes) for name, array in tensors.items()]
    with whole_file(folder / "model.safetensors") as stream:
        stream.write(header_bytes(entries, FORMAT))
        for array in tensors.values():
            stream.write(array.data)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, value in files.items():
        with whole_file(folder / name) as stream:
            stream.write(f"{json.dumps(value, indent=2)}\n".encode())


def byte_tokenizer() -> dict[str, object]:
    """A tokenizer.json whose 256 tokens are the bytes, in the byte-level alphabet of GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(shifted)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {**byte_level, "trim_offsets": True},
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {letters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
