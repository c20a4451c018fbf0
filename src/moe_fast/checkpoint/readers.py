"""Which programs load an MoE checkpoint, and why not: their rules, in one place.

transformers 4 (4.57.6) and 5 (5.23.0) were asked themselves; vLLM's native classes and llama.cpp's
converter were read. A reader that ignores a key takes its default without a word, so that a
checkpoint "loads" and computes something else; that counts as not loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_fast.checkpoint.moe import MoeModel

__all__ = ["Reader", "readers_of"]

TRANSFORMERS_4, TRANSFORMERS_5 = "transformers 4", "transformers 5"
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
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
    spelling as well where `either_count_key`. The defaults are those of transformers 4.
    """

    count_key: str
    default_count: int
    default_theta: float
    either_count_key: bool = False
    natively: tuple[str, ...] = READERS
    per_expert: tuple[str, ...] = READERS
    fused: tuple[str, ...] = (TRANSFORMERS_5,)


QWEN_FUSED = (TRANSFORMERS_5, LLAMA_CPP)
GRANITE = Rules("num_local_experts", 8, 1e4, per_expert=(), fused=READERS)
RULES = {
    "mixtral": Rules("num_local_experts", 8, 1e6, either_count_key=True),
    "qwen2_moe": Rules("num_experts", 60, 1e4, fused=QWEN_FUSED),
    "qwen3_moe": Rules("num_experts", 128, 1e4, either_count_key=True, fused=QWEN_FUSED),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "flex_olmo": Rules(
        "num_experts",
        7,
        5e5,
        either_count_key=True,
        natively=(TRANSFORMERS_4, TRANSFORMERS_5, VLLM),
    ),
    "deepseek": Rules("n_routed_experts", 0, 1e4, natively=(VLLM, LLAMA_CPP), fused=()),
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json")


def readers_of(model: MoeModel) -> tuple[Reader, ...]:
    """Each reader with what keeps it from loading the model; none for a family without rules."""
    rules = RULES.get(model.model_type)
    if rules is None or not model.layers:
        return ()
    found = []
    for name in READERS:
        reasons = tuple(obstacles(name, rules, model))
        found.append(Reader(name, not reasons, reasons))
    return tuple(found)


def obstacles(reader: str, rules: Rules, model: MoeModel) -> Iterator[str]:
    if reader not in rules.natively:
        yield f"has no {model.model_type} of its own"
        return
    readable = {"per-expert": rules.per_expert, "fused": rules.fused}
    if reader not in readable.get(model.layout, ()):
        others = [layout for layout, readers in readable.items() if reader in readers]
        yield f"does not read the {model.layout} layout" + "".join(
            f"; convert it to {layout}" for layout in others
        )
    if reader == LLAMA_CPP and not any((model.path / name).is_file() for name in TOKENIZERS):
        yield "needs the tokenizer, and no file of one is here"
    yield from misread_keys(reader, rules, model.config, model.num_experts)


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
            )
    parameters = config.get("rope_parameters")
    if reader == TRANSFORMERS_4 and isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta", rules.default_theta)
        if config.get("rope_theta", rules.default_theta) != theta:
            yield (
                f"does not look at rope_parameters, whose rope_theta is {theta}; "
                f"it would take {config.get('rope_theta', rules.default_theta)}"
            )
        kind = parameters.get("rope_type", "default")
        if kind != "default" and not config.get("rope_scaling"):
            yield f"looks for rope_scaling, config.json has it in rope_parameters alone ({kind})"
