"""Language models that are a part of a multimodal one: what becomes of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_fast.families.dense import DenseModel
from moe_fast.families.moe import MoeFamily
from moe_fast.storage.tensors import Weight
from moe_fast.wording import format_count

# What config.json says of the whole and not of its parts.
OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype")


def wrapped_family(
    config: Mapping[str, Any], families: Mapping[str, MoeFamily]
) -> tuple[MoeFamily, dict[str, Any]] | None:
    """The family of the MoE inside a multimodal model, and what config.json says of that MoE."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return None
    for family in families.values():
        outer = {model_type for model_type, _ in family.wrappers.values()}
        if config.get("model_type") in outer and inner.get("model_type") == family.name:
            return family, {**inner, **{key: config[key] for key in OF_THE_WHOLE if key in config}}
    return None


def has_place(family: MoeFamily, base: DenseModel) -> bool:
    """Whether the MoE stands in a multimodal model as its base does."""
    return base.wrapper is not None and base.wrapper.config.get("model_type") in family.wrappers


def wrapped_weights(
    family: MoeFamily,
    base: DenseModel,
    weights: Mapping[str, Weight],
    convert: Callable[[Weight], Weight],
) -> dict[str, Weight]:
    """The weights of an MoE under the names of the multimodal model, and the rest of that model."""
    wrapper = base.wrapper
    if wrapper is None or not has_place(family, base):
        return dict(weights)
    named = {
        wrapper.head
        if name == "lm_head.weight"
        else f"{wrapper.prefix}{name.removeprefix('model.')}": weight
        for name, weight in weights.items()
    }
    kept = {name: t for name, t in wrapper.rest.items() if not name.startswith(base.family.unread)}
    return named | {name: convert(Weight.of(tensor)) for name, tensor in kept.items()}


def wrapped_config(
    family: MoeFamily, base: DenseModel, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of the multimodal model with that of the MoE inside."""
    wrapper = base.wrapper
    if wrapper is None or not has_place(family, base):
        return dict(config)
    model_type, architecture = family.wrappers[wrapper.config["model_type"]]
    inner = {key: value for key, value in config.items() if key != "architectures"}
    outer = {k: v for k, v in wrapper.config.items() if k != "quantization_config"}
    return {
        **outer,
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": inner,
        **{key: config[key] for key in OF_THE_WHOLE if key in config},
    }


def warn_of_rest(family: MoeFamily, base: DenseModel) -> Iterator[str]:
    """What of the base's files is in no output."""
    file = base.path / "config.json"
    if base.wrapper is not None and not has_place(family, base):
        number = format_count(len(base.wrapper.rest), "tensor")
        yield (
            f"{file}: {base.wrapper.config.get('model_type')} is more than its language model; "
            f"{family.title} has no place for the rest, {number} are left out"
        )
    rest = () if base.wrapper is None else base.wrapper.rest
    unread = [*base.unread, *(name for name in rest if name.startswith(base.family.unread))]
    if base.family.unread and unread:
        number = format_count(len(unread), "tensor")
        yield f"{file}: {number} of layers that predict ahead, {unread[0]} first, are left out"
