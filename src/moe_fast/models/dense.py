"""A dense model folder, its configuration and its tensors checked against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError, Problem
from moe_fast.families.choice import UNFIT
from moe_fast.families.config import NUM_EXPERTS_KEYS, Sizes, check_values
from moe_fast.families.dense import (
    DenseFamily,
    DenseModel,
    Wrapper,
    read_windows,
)
from moe_fast.families.registry import dense_families
from moe_fast.models.folder import read_checkpoint, read_config
from moe_fast.storage.fp8 import SCALE, Block, find_scales, read_block
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief


def open_dense_model(path: str | os.PathLike[str]) -> DenseModel:
    """Read a model folder's configuration and headers; no weight is read.

    Raises
    ------
    CheckpointError
        With every problem of the folder, each naming its file and tensor.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    whole = read_config(folder)
    config = language_config(whole)
    model_type = config.get("model_type")
    family = dense_families().get(model_type) if isinstance(model_type, str) else None
    if family is None or family.is_moe(config):
        if family is not None or any(key in config for key in NUM_EXPERTS_KEYS):
            raise CheckpointError(
                f"the model ({model_type}) is a Mixture of Experts already; experts "
                "are made from dense models",
                file=config_file,
            )
        if isinstance(model_type, str) and model_type in UNFIT:
            raise CheckpointError(
                f"model_type {brief(model_type)} fits no MoE: {UNFIT[model_type]}",
                file=config_file,
            )
        raise CheckpointError(
            f"model_type {brief(model_type)} is not supported; "
            f"supported are {', '.join(dense_families())}",
            file=config_file,
        )
    quantised = config.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise CheckpointError(
            f"quantization_config is {brief(quantised)}; it must be an object or null",
            file=config_file,
        )
    block = read_block(quantised, str(config_file))
    config = family.with_defaults(config)
    check_values(config, config_file)
    sizes = family.read_sizes(config, config_file)
    stored = read_checkpoint(folder)
    wrapper = None
    if config_is_inner(whole):
        wrapper, stored = take_out(whole, stored, folder)
    unread = tuple(name for name in stored if name.startswith(family.unread))
    stored = {name: tensor for name, tensor in stored.items() if name not in unread}
    scales = find_scales(stored, block)
    of_scales = {f"{name}{SCALE}" for name in scales}
    stored = {name: tensor for name, tensor in stored.items() if name not in of_scales}
    tensors = check_tensors(folder, family, config, sizes, stored, scales)
    rope = family.read_rope(config, sizes, config_file)
    if family.interleaved and int(sizes.head_dim * rope.partial) % 2:
        raise CheckpointError(
            f"partial_rotary_factor turns {int(sizes.head_dim * rope.partial)} of a head's "
            f"{sizes.head_dim}; it must turn pairs",
            file=config_file,
        )
    windows = read_windows(family, config, sizes, config_file)
    multipliers = family.read_multipliers(config, sizes)
    return DenseModel(
        folder,
        family,
        config,
        sizes,
        rope,
        windows,
        multipliers,
        tensors,
        stored,
        wrapper,
        split_scales(family, tensors, stored, scales, block),
        block,
        unread,
    )


def split_scales(
    family: DenseFamily,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    block: Block | None,
) -> dict[str, Tensor]:
    """The scales of each tensor by its name here; those of a fused one are split as it is."""
    found: dict[str, Tensor] = {}
    if block is None or not scales:
        return found
    by_file = {(stored[name].file, stored[name].name): name for name in scales}
    for name, part in tensors.items():
        origin = by_file.get((part.file, part.name))
        if origin is None:
            continue
        start = (part.offset - stored[origin].offset) // part.shape[1]  # of one byte each
        if start % block[0]:
            raise CheckpointError(
                f"is in FP8, and its part for {name} begins in the middle of a block of "
                f"{block[0]} rows; that cannot be dequantised",
                file=part.file.path,
                tensor=part.name,
            )
        rows = -(-part.shape[0] // block[0])
        found[name] = scales[origin].rows(start // block[0], rows)
    return found


def config_is_inner(config: Mapping[str, Any]) -> bool:
    """Whether the language model is a part of a multimodal one."""
    inner, outer = config.get("text_config"), config.get("model_type")
    if not isinstance(inner, dict) or not isinstance(outer, str) or outer in dense_families():
        return False
    return isinstance(inner.get("model_type"), str)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, with what the whole says of it."""
    if not config_is_inner(config):
        return config
    of_both = ("tie_word_embeddings", "quantization_config")
    return {**config["text_config"], **{key: config[key] for key in of_both if key in config}}


def take_out(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], folder: Path
) -> tuple[Wrapper, dict[str, Tensor]]:
    """The tensors of the language model, by the names that they have where it stands alone."""
    ends = [name for name in stored if name.endswith("language_model.embed_tokens.weight")]
    ends += [name for name in stored if name.endswith("language_model.model.embed_tokens.weight")]
    if len(ends) != 1:
        raise CheckpointError(
            "has a text_config; its language model is looked for by the name of its embedding, "
            f"language_model.embed_tokens.weight, of which there are {len(ends)}",
            file=folder,
        )
    prefix = ends[0].removesuffix("embed_tokens.weight")
    heads = ("lm_head.weight", f"{prefix.removesuffix('model.')}lm_head.weight")
    head = next((name for name in heads if name in stored), heads[0])
    found = {
        f"model.{name.removeprefix(prefix)}": tensor
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    if head in stored:
        found["lm_head.weight"] = stored[head]
    rest = {n: t for n, t in stored.items() if not n.startswith(prefix) and n != head}
    return Wrapper(config, prefix, head, rest), found


def check_tensors(
    folder: Path,
    family: DenseFamily,
    config: Mapping[str, Any],
    sizes: Sizes,
    stored: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every expected tensor is there with its shape, and no other is; raise all problems.

    Those that have `scales` may be in FP8. Returns the tensors by the names that they have here,
    each part of a fused one by itself.
    """
    present = {family.name_here(name): tensor for name, tensor in stored.items()}
    numbers = {name.split(".")[2] for name in present if name.startswith("model.layers.")}
    layers = sizes.num_hidden_layers
    too_many = CheckpointError(
        f"config.json has num_hidden_layers {layers}, "
        f"the safetensors hold {len(stored)} tensors of {len(numbers)} layers",
        file=folder,
    )
    # Before looping over a number from a file: that many layers must be able to be there.
    if layers > len(numbers):
        raise too_many
    with_ffn = family.ffn_layers(sizes, config)
    first = family.layer_shapes(sizes, config, 0) | family.ffn_shapes(sizes, config)
    # Where layers are alike; one that has no FFN may have a few tensors alone.
    per_layer = len(family.stored(first)) if len(with_ffn) == layers else 1
    if layers * per_layer > 2 * len(stored):
        raise too_many
    expected = dict(family.outer_shapes(sizes, config))
    for layer in range(layers):
        shapes = family.layer_shapes(sizes, config, layer)
        if layer in with_ffn:
            shapes |= family.ffn_shapes(sizes, config)
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    optional = {"lm_head.weight": (sizes.vocab_size, sizes.hidden_size)}
    if not config["tie_word_embeddings"]:
        expected |= optional
    parts = family.stored(expected)
    whole = {
        name: (sum(expected[part][0] for part in held), *expected[held[0]][1:])
        for name, held in parts.items()
    }
    problems = [
        Problem("is missing", file=folder, tensor=family.name_in_files(name))
        for name in whole.keys() - present.keys()
    ]
    quantised = {family.name_here(name) for name in scales}
    for name, tensor in present.items():
        shape = whole.get(name, optional.get(name))
        if tensor.shape == shape and (tensor.dtype in WEIGHT_DTYPES or name in quantised):
            continue
        if shape is None:
            if name.endswith("rotary_emb.inv_freq"):  # old exports; readers compute it
                continue
            what = f"is not part of a {family.model_type} model"
        elif tensor.shape != shape:
            what = f"has the shape {list(tensor.shape)}, config.json makes it {list(shape)}"
        else:
            what = f"is {tensor.dtype}; F32, F16 and BF16 can be built from"
        problems.append(Problem(what, file=tensor.file.path, tensor=tensor.name))
    if problems:
        raise CheckpointError(*sorted(problems))
    tensors = {name: present[name] for name in optional if name in present}
    for name, held in parts.items():
        start = 0
        for part in held:
            tensors[part] = present[name].rows(start, expected[part][0])
            start += expected[part][0]
    return tensors
