"""What each key of a recipe may hold: those of mergekit-moe, in its own words, and ours."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from moe_fast.checkpoint.build_request import Backbone, ReinitSets
from moe_fast.checkpoint.construction import Split
from moe_fast.config import Dtype, Layout
from moe_fast.errors import MoeConfigError
from moe_fast.families.choice import as_target_name
from moe_fast.families.registry import moe_families
from moe_fast.plain import describe_value, typed
from moe_fast.records import dataclass
from moe_fast.request import RouterMethod
from moe_fast.storage.hub import REPOSITORY, repository_name

GateMode = Literal["random", "uniform_random", "cheap_embed", "hidden"]
# What mergekit-moe calls the starts of routers.
GATE_MODES: dict[GateMode, RouterMethod] = {
    "random": "normal",
    "uniform_random": "linear",
    "cheap_embed": "cheap_embed",
    "hidden": "hidden",
}

NO_LORA = "write it beside source_model, or merge it into the model first"
OF_CONFIG = "the model's config.json names its architecture"


def read_integer(value: Any, minimum: int = 0) -> int:
    if type(value) is int and minimum <= value < 2**63:
        return value
    limits = f"from {minimum} to 2**63 - 1, in decimal digits"
    raise MoeConfigError(f"must be an integer {limits}, got {describe_value(value)}")


def read_number(value: Any, minimum: float = -math.inf) -> float:
    # YAML 1.1 takes 1e-3, without a point, for a string.
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number >= minimum:
        return number
    limit = "" if minimum == -math.inf else f" of at least {minimum}"
    raise MoeConfigError(f"must be a finite number{limit}, got {describe_value(value)}")


def read_fraction(value: Any) -> float:
    number = read_number(value, minimum=0)
    if number > 1:
        raise MoeConfigError(f"must be from 0 to 1, got {describe_value(value)}")
    return number


def read_backbone(value: Any) -> Any:
    """`base`, `mean`, or the weights of the models in their mean."""
    if isinstance(value, list):
        return tuple(read_number(weight, minimum=0) for weight in value)
    if value in (None, *get_args(Backbone)):
        return value
    raise MoeConfigError(f"must be base, mean or a list of weights, got {describe_value(value)}")


def read_list(value: Any) -> Any:
    if isinstance(value, str):
        raise MoeConfigError(f"must be a list, got {describe_value(value)}; write [{value}]")
    if value == []:
        raise MoeConfigError("must not be empty")
    return value


def read_model_or_expert(value: Any) -> Any:
    is_expert = isinstance(value, dict) and "source_model" in value
    return read_expert(value if is_expert else {"source_model": value})


def read_expert(value: Any) -> Any:
    """An expert whose adapter has a key of its own, as mergekit writes it beside the model."""
    if not isinstance(value, dict):
        return value
    model = value.get("source_model")
    if isinstance(model, dict) and model.get("lora") is not None:
        given = {"source_model": {**model, "lora": None}, "lora": model["lora"]}
    elif isinstance(model, str) and "+" in model and not is_folder(model):
        name, _, lora = model.rpartition("+")
        given = {"source_model": name, "lora": lora}
    else:
        return value
    if value.get("lora") is not None:
        raise MoeConfigError("names an adapter twice: in source_model and in lora")
    return {**value, **given}


def is_folder(name: str) -> bool:
    # pathlib raises RuntimeError for the home of an unknown user, and OSError for a long name.
    return os.path.isdir(os.path.expanduser(name))  # noqa: PTH111, PTH112


def read_model(value: Any, kind: str = "a model") -> Any:
    """The folder of a model, absolute, or its name on the Hub, from a string or a mapping."""
    if isinstance(value, dict):  # as in mergekit
        return read_model_mapping(typed(value, ModelKeys, ""))
    if not isinstance(value, str):
        return value
    if is_folder(value):
        return str(Path(os.path.expanduser(value)).absolute())  # noqa: PTH111
    name = repository_name(value)
    if REPOSITORY.fullmatch(name):
        return name
    raise MoeConfigError(f"{value!r} is not a folder with {kind}")


def read_model_mapping(keys: ModelKeys) -> str:
    names = [name for name in (keys.model, keys.path) if name is not None]
    if len(names) != 1:
        raise MoeConfigError("must name one model")
    if keys.revision is None:
        return names[0]
    name = f"{names[0]}@{keys.revision}"
    if REPOSITORY.fullmatch(name):
        return name
    raise MoeConfigError(f"{name!r}: only a repository on the Hugging Face Hub has revisions")


def refuse(value: Any, advice: str) -> None:
    if value is not None:
        raise MoeConfigError(f"is not supported; {advice}")


def read_target(value: Any) -> Any:
    return as_target_name(value) if isinstance(value, str) else value


def read_architecture(value: Any) -> Any:
    """The target whose name in mergekit-moe begins with `value`."""
    if not isinstance(value, str):
        return value
    start = value.lower()
    names = {family.mergekit_name: family.name for family in moe_families().values()}
    found = [target for name, target in names.items() if name and name.startswith(start)]
    if len(found) == 1:
        return found[0]
    if sorted(found) == ["qwen2_moe", "qwen3_moe"]:
        return "qwen"
    raise MoeConfigError(
        f"must be mixtral, deepseek, qwen or qwen3, got {describe_value(value)}; "
        "the key target knows more families"
    )


Integer = Annotated[int, read_integer]
Count = Annotated[int, partial(read_integer, minimum=1)]
Model = Annotated[str, read_model]


@dataclass(frozen=True)
class ModelKeys:
    """A model as mergekit writes it in full."""

    model: Model | None = None
    path: Model | None = None
    revision: str | None = None
    lora: Annotated[None, partial(refuse, advice=NO_LORA)] = None
    override_architecture: Annotated[None, partial(refuse, advice=OF_CONFIG)] = None


@dataclass(frozen=True)
class ExpertKeys:
    """An expert; `None` stands for a key that the recipe leaves out."""

    source_model: Model
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    noise_scale: Annotated[float, partial(read_number, minimum=0)] | None = None
    lora: Annotated[str, partial(read_model, kind="an adapter")] | None = None
    residual_scale: Annotated[float, read_number] | None = None
    source_layers: Annotated[tuple[Integer, ...], read_list] | None = None
    texts: Annotated[tuple[str, ...], read_list] | None = None


Expert = Annotated[ExpertKeys, read_expert]
ModelOrExpert = Annotated[ExpertKeys, read_model_or_expert]


@dataclass(frozen=True)
class RecipeKeys:
    """A whole recipe; `None` stands for a key that it leaves out."""

    base_model: Model | None = None
    experts: Annotated[tuple[Expert, ...], read_list] | None = None
    models: Annotated[tuple[ModelOrExpert, ...], read_list] | None = None
    num_experts: Count | None = None
    experts_per_token: Count | None = None
    shared_experts: tuple[Expert, ...] | None = None
    dense_layers: tuple[Integer, ...] | None = None
    gate_mode: GateMode | None = None
    routers: RouterMethod | None = None
    logit_std: Annotated[float, read_number] | None = None
    texts: Annotated[tuple[str, ...], read_list] | None = None
    tokens: str | None = None
    tokens_used: Count | None = None
    device: str | None = None
    architecture: Annotated[str, read_architecture] | None = None
    target: Annotated[str, read_target] | None = None
    layout: Layout | None = None
    dtype: Dtype | None = None
    seed: Integer | None = None
    granularity: Count | None = None
    mix_copies: bool | None = None
    shuffle: bool | None = None
    reinit: Annotated[float, read_fraction] | None = None
    reinit_sets: ReinitSets | None = None
    split: Split | None = None
    backbone: Annotated[Any, read_backbone] = None
