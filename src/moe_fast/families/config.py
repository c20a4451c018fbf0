"""What every family's config.json says: sizes, rotary embedding, multipliers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_fast.errors import CheckpointError, Problem
from moe_fast.records import dataclass
from moe_fast.storage.strict_json import LARGEST_SIZE, brief

# What families call the number of experts, and of those that work on a token.
NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk"),
    "top_k_experts",
)
# The groups that a router chooses from before it chooses experts, and how many of them it chooses.
GROUP_KEYS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"))
# Kinds of rotary embedding, each with the keys that it cannot do without.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ROPE_TYPES = tuple(ROPE_KEYS)
# The context that a model was trained with before its rope was scaled. Where config.json has it
# outside of the scaling, that counts for these.
ORIGINAL = "original_max_position_embeddings"
ROPES_WITH_ORIGINAL = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Sizes:
    """The numbers that every tensor shape of a dense transformer follows from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Multipliers(NamedTuple):
    """What Granite multiplies its activations with; elsewhere all but the attention's are 1."""

    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and its scaling if it has any.

    `partial` is the part of each head that it turns. `layer_thetas` are the bases of the layers
    where these differ, 0 where a layer has no embedding of positions.
    """

    theta: float
    scaling: Mapping[str, Any] | None = None
    partial: float = 1.0
    layer_thetas: tuple[float, ...] | None = None

    def in_every_spelling(self) -> dict[str, Any]:
        """The keys of `config.json` that say so, for every reader."""
        scaling = None if self.scaling is None else dict(self.scaling)
        parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": self.theta}
        partial = {} if self.partial == 1 else {"partial_rotary_factor": self.partial}
        keys = {
            "rope_theta": self.theta,
            "rope_scaling": scaling,
            "rope_parameters": {**parameters, **partial},
            **partial,
        }
        if scaling is not None and scaling["rope_type"] == "longrope" and ORIGINAL in scaling:
            keys[ORIGINAL] = scaling[ORIGINAL]  # transformers 4 looks for it there alone
        return keys


def check_values(config: Mapping[str, Any], file: Path) -> None:
    """The values that decide what a model computes have their types; raise all that have not."""
    problems = [
        Problem(f"{key} is {brief(config[key])}; it must be {kind}", file=file)
        for kind, (holds, keys) in KINDS.items()
        for key in keys
        if key in config and not holds(config[key])
    ]
    if problems:
        raise CheckpointError(*problems)


def is_number(value: Any) -> bool:
    """Whether `value` is one that every reader can hold: JSON has integers of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def is_token(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) <= LARGEST_SIZE)


# What must hold of a key wherever a configuration has it.
KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a string": (lambda value: isinstance(value, str), ("hidden_act",)),
    "an integer of at least 1": (is_count, ("max_position_embeddings",)),
    "a positive number": (
        lambda value: is_number(value) and value > 0,
        ("rms_norm_eps", *Multipliers._fields),
    ),
    "a number of at least 0": (
        lambda value: is_number(value) and value >= 0,
        ("initializer_range", "attention_dropout"),
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
            *("attention_out_bias", "use_bias"),
        ),
    ),
    "a token's number or null": (is_token, ("bos_token_id", "pad_token_id")),
    "a token's number, a list of them or null": (
        lambda value: all(map(is_token, value)) if isinstance(value, list) else is_token(value),
        ("eos_token_id",),
    ),
}


def read_sizes(config: Mapping[str, Any], file: Path) -> Sizes:
    problems = []

    def size(key: str, default: int | None = None) -> int:
        value: Any = config.get(key)
        if value is None and default is not None:
            return default
        if not is_count(value):
            missing = "is missing" if key not in config else f"is {brief(value)}"
            problems.append(
                Problem(f"{key} {missing}; it must be an integer of at least 1", file=file)
            )
            return 1
        return int(value)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    sizes = Sizes(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", max(hidden // heads, 1)),
    )
    if problems:
        raise CheckpointError(*problems)
    return sizes


def read_rope(config: Mapping[str, Any], file: Path, *, partial: bool = False) -> Rope:
    """The rotary embedding from either spelling: `rope_parameters`, or theta with scaling.

    One that rotates a part of each head is refused unless `partial`.
    """
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(
                f"{key} is {brief(value)}; it must be an object or null", file=file
            )
    merged = {**(scaling or {}), **(parameters or {})}
    theta = merged.pop("rope_theta", config["rope_theta"])
    if not is_number(theta) or not theta > 0:
        raise CheckpointError(
            f"rope_theta is {brief(theta)}; it must be a positive number", file=file
        )
    kind = merged.get("rope_type", merged.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(
            f"rope_type is {brief(kind)}; known are {', '.join(ROPE_TYPES)}", file=file
        )
    if kind in ROPES_WITH_ORIGINAL and config.get(ORIGINAL) is not None:
        merged[ORIGINAL] = config[ORIGINAL]
    for key in ROPE_KEYS[kind]:
        if key not in merged:
            raise CheckpointError(f"rope_type {kind!r} needs the key {key!r}", file=file)
    part = merged.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if part != 1 and not partial:
        raise CheckpointError(
            f"partial_rotary_factor is {brief(part)}; models of this family rotate whole heads",
            file=file,
        )
    if not is_number(part) or not 0 < part <= 1:
        raise CheckpointError(
            f"partial_rotary_factor is {brief(part)}; it must be a number above 0, at most 1",
            file=file,
        )
    for key, value in merged.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(is_number(n) or isinstance(n, (str, bool, type(None))) for n in numbers):
            raise CheckpointError(
                f"the rope's {brief(key)} is {brief(value)}; "
                "it must be a number or a list of numbers",
                file=file,
            )
    scaled = None if kind == "default" else {"rope_type": kind, **merged}
    return Rope(theta, scaled, float(part))


def first_size(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that holds a positive integer."""
    found = (config[key] for key in keys if type(config.get(key)) is int and config[key] > 0)
    return next(found, None)
