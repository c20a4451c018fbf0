"""Which programs load an MoE checkpoint, and why others do not.

A reader that ignores a key takes its default without a word, so that a checkpoint "loads" and
computes something else. That counts as not loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.config import ORIGINAL
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import (
    LLAMA_CPP,
    READERS,
    TRANSFORMERS_4,
    TRANSFORMERS_5,
    Reader,
    Rules,
)

REMEDY = "moe-fast convert writes both spellings"


def find_readers(
    config: Mapping[str, Any], layout: str, num_experts: int, *, has_tokenizer: bool
) -> tuple[Reader, ...]:
    """Each reader, and why it does not load a checkpoint of this `config.json` and layout.

    Empty for a family without rules.
    """
    model_type = config.get("model_type")
    family = moe_families().get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return ()
    found = []
    for reader in READERS:
        if reader in family.rules.natively:
            reasons = [
                *layout_problems(reader, family.rules, layout),
                *misread_keys(reader, family.rules, config, num_experts),
            ]
            if reader == LLAMA_CPP:
                reasons += llama_cpp_problems(family.rules, config, num_experts, has_tokenizer)
            reasons += family.reader_problems(reader, config)
        else:
            reasons = [f"has no {model_type} of its own"]
        found.append(Reader(reader, not reasons, tuple(reasons)))
    return tuple(found)


def layout_problems(reader: str, rules: Rules, layout: str) -> Iterator[str]:
    readable = {"per-expert": rules.per_expert, "fused": rules.fused}
    if reader not in readable.get(layout, ()):
        others = [other for other, readers in readable.items() if reader in readers]
        yield f"does not read the {layout} layout" + "".join(
            f"; convert it to {other}" for other in others
        )


def llama_cpp_problems(
    rules: Rules, config: Mapping[str, Any], num_experts: int, has_tokenizer: bool
) -> Iterator[str]:
    """What llama.cpp has one way of doing, and `config.json` asks for otherwise."""
    family = config.get("model_type")
    if not has_tokenizer:
        yield "needs the tokenizer, and no file of one is here"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield f"wants experts in every layer of a {family}, some here are dense"
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
