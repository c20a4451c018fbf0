"""Which programs load an MoE checkpoint, and why not: their rules, in one place.

transformers 4 (4.57.6) and 5 (5.23.0), vLLM (0.32.0) and llama.cpp (the converter of
llama-cpp-python 0.3.36) were asked themselves. A reader that ignores a key takes its default
without a word, so that a checkpoint "loads" and computes something else; that counts as not
loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fast.checkpoint.source import ORIGINAL

__all__ = ["Reader", "has_tokenizer", "readers_of"]

TRANSFORMERS_4, TRANSFORMERS_5 = "transformers 4", "transformers 5"
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
REMEDY = "moe-fast convert writes both spellings"
READERS = (TRANSFORMERS_4, TRANSFORMERS_5, VLLM, LLAMA_CPP)


@dataclass(frozen=True)
class Reader:
    """A program, whether it loads the checkpoint, and if not, why."""

    name: str
    loads: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What the readers know of one family.

    `count_key` is where they look for the number of experts. transformers 5 knows the other
    spelling as well where `either_count_key`. The defaults are those of transformers 4. llama.cpp
    knows the types of rope in `llama_cpp_ropes`. Of the families with a `norm_topk_prob`, it
    divides the chosen experts' weights by their sum in some and not in others, whatever
    `config.json` says.
    """

    count_key: str
    default_count: int
    default_theta: float
    llama_cpp_normalises: bool | None = None
    llama_cpp_ropes: tuple[str, ...] = ("default", "linear", "yarn")
    either_count_key: bool = False
    natively: tuple[str, ...] = READERS
    per_expert: tuple[str, ...] = READERS
    fused: tuple[str, ...] = (TRANSFORMERS_5,)


QWEN_FUSED = (TRANSFORMERS_5, VLLM, LLAMA_CPP)
GRANITE = Rules("num_local_experts", 8, 1e4, per_expert=(), fused=READERS)
RULES = {
    "mixtral": Rules(
        "num_local_experts",
        8,
        1e6,
        llama_cpp_ropes=("default", "linear", "yarn", "llama3"),
        either_count_key=True,
    ),
    "qwen2_moe": Rules("num_experts", 60, 1e4, llama_cpp_normalises=False, fused=QWEN_FUSED),
    "qwen3_moe": Rules(
        "num_experts",
        128,
        1e4,
        llama_cpp_normalises=True,
        either_count_key=True,
        fused=QWEN_FUSED,
    ),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "flex_olmo": Rules(
        "num_experts",
        7,
        5e5,
        either_count_key=True,
        natively=(TRANSFORMERS_4, TRANSFORMERS_5, VLLM),  # vLLM by transformers' classes
        fused=(TRANSFORMERS_5, VLLM),
    ),
    "deepseek": Rules(
        "n_routed_experts",
        0,
        1e4,
        llama_cpp_normalises=False,
        llama_cpp_ropes=("default",),
        natively=(VLLM, LLAMA_CPP),
        fused=(),
    ),
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer that llama.cpp could convert."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def readers_of(
    config: Mapping[str, Any], layout: str, num_experts: int, *, has_tokenizer: bool
) -> tuple[Reader, ...]:
    """Each reader with what keeps it from loading a checkpoint of this `config.json` and layout.

    There are none for a family without rules.
    """
    family = config.get("model_type")
    rules = RULES.get(family) if isinstance(family, str) else None
    if rules is None:
        return ()
    found = []
    for name in READERS:
        reasons = list(obstacles(name, rules, layout, has_tokenizer))
        if name in rules.natively:
            reasons += misread_keys(name, rules, config, num_experts)
            if name == VLLM:
                reasons += not_of_vllm(config)
            if name == LLAMA_CPP:
                reasons += not_of_llama_cpp(rules, config, num_experts)
        else:
            reasons = [f"has no {family} of its own"]
        found.append(Reader(name, not reasons, tuple(reasons)))
    return tuple(found)


def obstacles(reader: str, rules: Rules, layout: str, has_tokenizer: bool) -> Iterator[str]:
    readable = {"per-expert": rules.per_expert, "fused": rules.fused}
    if reader not in readable.get(layout, ()):
        others = [other for other, readers in readable.items() if reader in readers]
        yield f"does not read the {layout} layout" + "".join(
            f"; convert it to {other}" for other in others
        )
    if reader == LLAMA_CPP and not has_tokenizer:
        yield "needs the tokenizer, and no file of one is here"


def not_of_vllm(config: Mapping[str, Any]) -> Iterator[str]:
    """Weights of attention that vLLM leaves out without a word."""
    family = config.get("model_type")
    if config.get("attention_bias"):
        if family in ("granitemoe", "granitemoeshared"):
            yield f"leaves the biases of attention out of a {family}"
        if family == "qwen3_moe":
            yield f"leaves the bias of o_proj out of a {family}"


def not_of_llama_cpp(rules: Rules, config: Mapping[str, Any], num_experts: int) -> Iterator[str]:
    """What llama.cpp has one way of doing, and `config.json` asks for otherwise."""
    family = config.get("model_type")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield f"wants experts in every layer of a {family}, some here are dense"
    if config.get("moe_layer_freq", 1) != 1:
        yield "does not look at moe_layer_freq, and would look for experts in dense layers"
    does, asked = rules.llama_cpp_normalises, bool(config.get("norm_topk_prob"))
    if does not in (None, asked) and config.get("num_experts_per_tok") != num_experts:
        divides = "divides" if does else "does not divide"
        yield (
            f"{divides} the weights of a {family}'s chosen experts by their sum, "
            f"norm_topk_prob is {str(asked).lower()}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, Mapping):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in rules.llama_cpp_ropes:
            yield f"has no rope of type {kind} in a {family}"
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    context = config.get("max_position_embeddings")
    reaches = isinstance(window, int) and isinstance(context, int) and window >= context
    if window is not None and not reaches:
        yield f"has no sliding window in a {family}, here it is {window}"
    if family == "qwen3_moe" and config.get("attention_bias"):
        yield f"has no place for the bias of o_proj in a {family}"
    if family == "deepseek" and not config.get("n_shared_experts"):
        yield "wants a shared expert in a deepseek, here is none"
    if family == "qwen2_moe" and config.get("tie_word_embeddings"):
        yield f"wants a head of its own in a {family}, here it is the embedding"


def misread_keys(
    reader: str, rules: Rules, config: Mapping[str, Any], num_experts: int
) -> Iterator[str]:
    """Keys of `config.json` that the reader does not look at, and would take a default for."""
    keys = {"num_experts", "num_local_experts", rules.count_key}
    knows_both = reader == TRANSFORMERS_5 and rules.either_count_key
    if rules.count_key not in config and not (knows_both and keys & config.keys()):
        there = [key for key in sorted(keys) if key in config]
        default = rules.default_count
        if num_experts != default or reader == LLAMA_CPP:
            yield (
                f"looks for {rules.count_key}, config.json has {' and '.join(there) or 'none'}"
                + (f"; it would take {default} experts" if reader != LLAMA_CPP and default else "")
                + (f"; {REMEDY}" if there else "")
            )
    parameters = config.get("rope_parameters")
    if reader == TRANSFORMERS_4 and isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta", rules.default_theta)
        if config.get("rope_theta", rules.default_theta) != theta:
            yield (
                f"does not look at rope_parameters, whose rope_theta is {theta}; "
                f"it would take {config.get('rope_theta', rules.default_theta)}; {REMEDY}"
            )
        kind = parameters.get("rope_type", "default")
        if kind != "default" and not config.get("rope_scaling"):
            yield (
                f"looks for rope_scaling, config.json has it in rope_parameters alone ({kind}); "
                f"{REMEDY}"
            )
        if kind == "longrope" and ORIGINAL in parameters and ORIGINAL not in config:
            yield f"looks for {ORIGINAL} outside of rope_parameters; {REMEDY}"
