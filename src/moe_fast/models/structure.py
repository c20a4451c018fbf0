"""What a checkpoint of a known family must hold, by its config.json: every name and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import Problem
from moe_fast.families.config import Sizes, read_rope, read_sizes
from moe_fast.families.dense import DenseFamily
from moe_fast.families.moe import MoeFamily, Shapes, as_count
from moe_fast.families.registry import dense_families, moe_families
from moe_fast.families.wrappers import wrapped_family
from moe_fast.models.moe import MoeModel

HEAD = "lm_head.weight"
MOST_AHEAD = 64  # layers that predict ahead, far above what models have


def structure_problems(model: MoeModel) -> list[Problem]:
    """Where configuration and tensors are not those of the model's family.

    Raises
    ------
    CheckpointError
        For a configuration whose numbers are none.
    """
    model = language_model(model)
    family = moe_families()[model.model_type]
    file = model.path / "config.json"
    config = family.effective_config(model.config)
    twin = dense_families()[family.twin_name(config)]
    config = {**twin.defaults, **config}  # of what a twin alone has, none is read
    if "moe_intermediate_size" in config:  # some families have no other width
        config.setdefault("intermediate_size", config["moe_intermediate_size"])
    sizes = read_sizes(config, file)
    if family.blocks is None:
        read_rope(config, file, partial=family.partial_rotary)
    ahead = prediction_tensors(model, sizes.num_hidden_layers)
    layers = family.name_in_files("model.layers.")
    present = {
        name.removeprefix(layers).partition(".")[0]
        for name in model.tensors.keys() - ahead
        if name.startswith(layers)
    }
    if sizes.num_hidden_layers != len(present):  # before looping over a number from a file
        return [
            Problem(
                f"num_hidden_layers is {sizes.num_hidden_layers}, "
                f"the safetensors hold tensors of {len(present)} layers",
                file=file,
            )
        ]
    problems = list(config_problems(family, model))
    expected = expected_shapes(family, twin, model, config, sizes)
    problems += [
        Problem("is missing", file=model.path, tensor=name)
        for name in expected
        if name not in model.tensors
    ]
    quantised = isinstance(model.config.get("quantization_config"), dict)
    for name, tensor in model.tensors.items():
        if name in ahead:
            continue
        if name not in expected:
            scales = quantised and name.endswith(".weight_scale_inv")
            if scales or name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # optional
            what = f"is not part of a {family.title} model"
        elif tensor.shape != expected[name]:
            what = (
                f"has the shape {list(tensor.shape)}, config.json makes it {list(expected[name])}"
            )
        else:
            continue
        problems.append(Problem(what, file=tensor.file.path, tensor=tensor.name))
    return problems


def language_model(model: MoeModel) -> MoeModel:
    """The language model of a multimodal one, under the names that it has alone; others as is."""
    inner = wrapped_family(model.config, moe_families())
    if inner is None:
        return model
    embedding = "embed_tokens.weight"
    prefixes = [name.removesuffix(embedding) for name in model.tensors if name.endswith(embedding)]
    prefix = next((each for each in prefixes if "language_model." in each), "model.")
    tensors = {
        f"model.{name.removeprefix(prefix)}": tensor
        for name, tensor in model.tensors.items()
        if name.startswith(prefix)
    }
    for name, tensor in model.tensors.items():
        if name.rpartition("language_model.")[2] == HEAD:
            tensors[HEAD] = tensor
    return replace(model, config=inner[1], tensors=tensors)


def prediction_tensors(model: MoeModel, num_layers: int) -> set[str]:
    """The tensors of layers for multi-token prediction, which stand after the model's own."""
    number = model.config.get("num_nextn_predict_layers")
    if type(number) is not int:
        return set()
    prefixes = tuple(f"model.layers.{num_layers + i}." for i in range(min(number, MOST_AHEAD)))
    return {name for name in model.tensors if name.startswith(prefixes)}


def config_problems(family: MoeFamily, model: MoeModel) -> Iterator[Problem]:
    """Keys that decide how tokens are routed, and do not fit the experts that are there."""
    file = model.path / "config.json"
    for key in family.count_keys:
        value = model.config.get(key)
        if value is not None and value != model.num_experts:
            yield Problem(
                f"{key} is {value!r}, the safetensors hold {model.num_experts} experts", file=file
            )
    top_k = model.config.get("num_experts_per_tok")
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= model.num_experts):
        yield Problem(
            f"num_experts_per_tok is {top_k!r}; "
            f"it must be an integer from 1 to {model.num_experts}",
            file=file,
        )
    theta, parameters = model.config.get("rope_theta"), model.config.get("rope_parameters")
    if theta is not None and isinstance(parameters, Mapping):
        other = parameters.get("rope_theta", theta)
        if other != theta:
            yield Problem(
                f"rope_theta is {theta}, that of rope_parameters {other}; "
                "transformers 4 takes the first, 5 the second",
                file=file,
            )


def expected_shapes(
    family: MoeFamily,
    twin: DenseFamily,
    model: MoeModel,
    config: Mapping[str, Any],
    sizes: Sizes,
) -> Shapes:
    vocabulary, hidden = sizes.vocab_size, sizes.hidden_size
    expected: Shapes = dict(twin.outer_shapes(sizes, config))
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (vocabulary, hidden)
    dense_layers = family.dense_layers(config, sizes.num_hidden_layers)
    with_ffn = twin.ffn_layers(sizes, config)
    for layer in range(sizes.num_hidden_layers):
        shapes = dict(twin.layer_shapes(sizes, config, layer))
        if layer not in with_ffn:
            pass
        elif layer in dense_layers:
            width = family.dense_width(config)
            shapes |= twin.ffn_shapes(replace(sizes, intermediate_size=width), config)
        else:
            shapes |= family.shared_shapes(config, hidden)
            expected |= expert_shapes(family, model, config, layer, hidden)
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return {family.name_in_files(name): shape for name, shape in expected.items()}


def expert_shapes(
    family: MoeFamily, model: MoeModel, config: Mapping[str, Any], layer: int, hidden: int
) -> Shapes:
    """Experts and router of a layer."""
    width = as_count(config, "moe_intermediate_size", as_count(config, "intermediate_size"))
    inner = family.expert_input(config, hidden)
    matrix = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    layout = Layout.FUSED if model.layout == "fused" else Layout.PER_EXPERT
    if layout not in family.layouts:
        layout = family.layouts[0]
    expected: Shapes = {family.router_name(layer, layout): (model.num_experts, hidden)}
    for tensor in family.expert_tensors(layer, model.num_experts, layout):
        rows, columns = matrix[tensor.slices[0][1]]
        parts = len(tensor.slices)
        if tensor.stacked:
            shape: tuple[int, ...] = (model.num_experts, rows * parts // model.num_experts, columns)
        else:
            shape = (rows * parts, columns)
        expected[tensor.name] = shape
    return expected
