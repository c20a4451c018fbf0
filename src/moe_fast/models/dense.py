"""A dense model folder, its configuration and its tensors checked against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError, Problem
from moe_fast.families.config import NUM_EXPERTS_KEYS, Sizes, check_values, read_rope, read_sizes
from moe_fast.families.dense import DenseFamily, DenseModel, read_multipliers, read_windows
from moe_fast.families.registry import dense_families
from moe_fast.models.folder import read_checkpoint, read_config
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
    config = read_config(folder)
    model_type = config.get("model_type")
    family = dense_families().get(model_type) if isinstance(model_type, str) else None
    if family is None:
        if any(key in config for key in NUM_EXPERTS_KEYS):
            raise CheckpointError(
                f"the model ({model_type}) is a Mixture of Experts already; experts "
                "are made from dense models",
                file=config_file,
            )
        raise CheckpointError(
            f"model_type {brief(model_type)} is not supported; "
            f"supported are {', '.join(dense_families())}",
            file=config_file,
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            "the model is quantised; dequantise it before it becomes experts", file=config_file
        )
    config = {**family.defaults, **config}
    check_values(config, config_file)
    sizes = read_sizes(config, config_file)
    rope = read_rope(config, config_file)
    tensors = read_checkpoint(folder)
    check_tensors(folder, family, config, sizes, tensors)
    windows = read_windows(family, config, sizes, config_file)
    multipliers = read_multipliers(family, config, sizes)
    return DenseModel(folder, family, config, sizes, rope, windows, multipliers, tensors)


def check_tensors(
    folder: Path,
    family: DenseFamily,
    config: Mapping[str, Any],
    sizes: Sizes,
    tensors: dict[str, Tensor],
) -> None:
    """Every expected tensor is there with its shape, and no other is; raise all problems."""
    per_layer = family.layer_shapes(sizes, config) | family.ffn_shapes(sizes, config)
    present = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    # Before looping over a number from a file: that many layers must be able to be there.
    layers = sizes.num_hidden_layers
    if layers > len(present) or layers * len(per_layer) > 2 * len(tensors):
        raise CheckpointError(
            f"config.json has num_hidden_layers {layers}, "
            f"the safetensors hold {len(tensors)} tensors of {len(present)} layers",
            file=folder,
        )
    expected = {
        "model.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size),
        "model.norm.weight": (sizes.hidden_size,),
    }
    for layer in range(sizes.num_hidden_layers):
        expected |= {f"model.layers.{layer}.{name}": s for name, s in per_layer.items()}
    optional = {"lm_head.weight": (sizes.vocab_size, sizes.hidden_size)}
    if not config["tie_word_embeddings"]:
        expected |= optional
    problems = [
        Problem("is missing", file=folder, tensor=name) for name in expected.keys() - tensors.keys()
    ]
    for name, tensor in tensors.items():
        shape = expected.get(name, optional.get(name))
        if tensor.shape == shape and tensor.dtype in WEIGHT_DTYPES:
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
