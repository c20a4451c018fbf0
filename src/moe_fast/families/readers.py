"""Which programs load an MoE checkpoint, and why others do not.

A reader that ignores a key takes its default without a word, so that a checkpoint "loads" and
computes something else. That counts as not loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.config import ORIGINAL
from moe_fast.families.key_types import find_wrong_types
from moe_fast.families.moe import MoeFamily
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import (
    LLAMA_CPP,
    READERS,
    TRANSFORMERS_4,
    TRANSFORMERS_5,
    VLLM,
    Reader,
    Rules,
)
from moe_fast.families.wrappers import wrapped_family
from moe_fast.records import dataclass
from moe_fast.storage.strict_json import brief

# Readers that take a stored head even if config.json says that the head is the embedding.
TAKE_STORED_HEAD = (TRANSFORMERS_5, VLLM, LLAMA_CPP)
# Readers that refuse a value of another type than transformers 5 expects; vLLM asks it.
CHECK_TYPES = (TRANSFORMERS_5, VLLM)
LLAMA_CPP_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS in its source
# Where llama.cpp looks for the number of experts, one after the other.
LLAMA_CPP_COUNT_KEYS = ("num_local_experts", "num_experts")
REMEDY = "moe-fast convert writes both spellings"


@dataclass(frozen=True)
class Contents:
    """What readers meet in a checkpoint besides its config.json.

    Parameters
    ----------
    layout : str
        `"per-expert"` or `"fused"`.
    num_experts : int
        Experts of each layer.
    has_tokenizer : bool
        Whether a tokenizer is there that llama.cpp could convert.
    has_sentencepiece : bool
        Whether the tokenizer is there as sentencepiece has it, in `tokenizer.model`.
    largest_token : int, optional
        The largest token that the tokenizer gives, if the embedding has no row for it.
    added_tokens : frozenset of str
        The tokens that the tokenizer has beside its vocabulary, where a reader looks for some.
    has_head : bool
        Whether a head is stored.
    has_other_head : bool
        Whether `config.json` ties the head to the embedding, and another head is stored.
    missing_code, missing_tokenizer_code : tuple of str
        The code that is named and not there, a sentence for each file: any, and that of the
        tokenizer.
    other_names : tuple of (str, str)
        The names of tensors that readers do not look for, each with the one that they do.
    """

    layout: str
    num_experts: int
    has_tokenizer: bool = True
    has_sentencepiece: bool = False
    largest_token: int | None = None
    added_tokens: frozenset[str] = frozenset()
    has_head: bool = True
    has_other_head: bool = False
    missing_code: tuple[str, ...] = ()
    missing_tokenizer_code: tuple[str, ...] = ()
    other_names: tuple[tuple[str, str], ...] = ()


def readers_of(family: MoeFamily) -> tuple[str, ...]:
    """The readers that load some checkpoints of a family."""
    rules = family.rules
    able = {*rules.per_expert, *rules.fused} & {*rules.natively}
    # What they object to whatever config.json says, they object to in an empty one.
    return tuple(
        reader
        for reader in READERS
        if reader in able and not any(family.reader_problems(reader, {}))
    )


def find_readers(config: Mapping[str, Any], contents: Contents) -> tuple[Reader, ...]:
    """Each reader, and why it does not load a checkpoint of this `config.json`.

    Of a multimodal model, what they say of its language model. Empty for a family without rules.
    """
    model_type = config.get("model_type")
    family = moe_families().get(model_type) if isinstance(model_type, str) else None
    inner = wrapped_family(config, moe_families())
    if inner is not None:
        family, config = inner
    if family is None:
        return ()
    # Nobody has asked these two for a multimodal model.
    unasked = () if inner is None else (VLLM, LLAMA_CPP)
    found = []
    for reader in READERS:
        if reader in unasked:
            reasons = [f"has been asked for no {model_type} yet, it may load it"]
        elif reader in family.rules.natively:
            reasons = [
                *layout_problems(reader, family.rules, contents.layout),
                *misread_keys(reader, family.rules, config, contents.num_experts),
                *head_problems(reader, family.rules, config, contents),
                *value_problems(reader, family, config),
                *code_problems(reader, family, contents),
                *name_problems(reader, contents),
            ]
            if reader == LLAMA_CPP:
                reasons += llama_cpp_problems(family.rules, config, contents)
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


def head_problems(
    reader: str, rules: Rules, config: Mapping[str, Any], contents: Contents
) -> Iterator[str]:
    family = config.get("model_type")
    if reader in rules.want_head and config.get("tie_word_embeddings") and not contents.has_head:
        yield f"wants a head of its own in a {family}, here it is the embedding"
    if contents.has_other_head and reader in TAKE_STORED_HEAD:
        yield "takes the stored head, config.json says that the head is the embedding"


def value_problems(reader: str, family: MoeFamily, config: Mapping[str, Any]) -> Iterator[str]:
    """Values of `config.json` that the reader refuses."""
    if reader in CHECK_TYPES and TRANSFORMERS_5 in family.rules.natively:
        yield from find_wrong_types(config, family.key_types())
    effective = family.effective_config(config)
    activation = effective.get("hidden_act", "silu")
    if reader in (VLLM, LLAMA_CPP) and activation not in ("silu", "swish"):
        yield f"has silu alone in a {family.name}, hidden_act is {brief(activation)}"
    pad, rows = effective["pad_token_id"], effective.get("vocab_size")
    padding = family.pads and reader in (TRANSFORMERS_4, TRANSFORMERS_5)
    if padding and is_beyond(pad, rows):
        yield f"takes no padding beyond the embedding: pad_token_id is {pad}, of {rows} rows"


def is_beyond(token: Any, num_rows: Any) -> bool:
    """Whether a token, counted from the end if it is negative, is not a row of an embedding."""
    if type(token) is not int or type(num_rows) is not int:
        return False
    return not -num_rows <= token < num_rows


def code_problems(reader: str, family: MoeFamily, contents: Contents) -> Iterator[str]:
    """Code of the model is needed if transformers has no class of its own."""
    if reader == LLAMA_CPP:
        return
    own = TRANSFORMERS_5 in family.rules.natively
    yield from contents.missing_tokenizer_code if own else contents.missing_code


def name_problems(reader: str, contents: Contents) -> Iterator[str]:
    """transformers sees where `model.` is missing, transformers 5 also where it stands twice."""
    names = list(contents.other_names)
    if reader in (TRANSFORMERS_4, TRANSFORMERS_5):
        names = [(found, name) for found, name in names if name != f"model.{found}"]
    if reader == TRANSFORMERS_5:
        names = [(found, name) for found, name in names if found != f"model.{name}"]
    for found, name in names[:1]:
        yield f"looks for {brief(name)}, which is {brief(found)} here; moe-fast convert renames it"


def llama_cpp_problems(
    rules: Rules, config: Mapping[str, Any], contents: Contents
) -> Iterator[str]:
    """What llama.cpp has one way of doing, and `config.json` asks for otherwise."""
    family = config.get("model_type")
    if contents.num_experts > LLAMA_CPP_MOST_EXPERTS:
        yield f"takes at most {LLAMA_CPP_MOST_EXPERTS} experts, here are {contents.num_experts}"
    if rules.llama_cpp_wants_sentencepiece and not contents.has_sentencepiece:
        yield f"needs tokenizer.model in a {family}, the tokenizer as sentencepiece has it"
    elif not contents.has_tokenizer:
        yield "needs the tokenizer, and no file of one is here"
    rows, largest = config.get("vocab_size"), contents.largest_token
    ignores_others = rules.llama_cpp_sentencepiece and contents.has_sentencepiece
    if largest is not None and type(rows) is int and largest >= rows and not ignores_others:
        yield f"takes no tokens beyond the embedding: the tokenizer has {largest}, of {rows} rows"
    if config.get("attention_bias") and not rules.llama_cpp_output_bias:
        yield f"has no place for the bias of o_proj in a {family}"
    missing = [token for token in rules.llama_cpp_tokens if token not in contents.added_tokens]
    if contents.has_tokenizer and missing:
        yield f"looks for {', '.join(missing)} in the tokenizer of a {family}"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield f"wants experts in every layer of a {family}, some here are dense"
    does, asked = rules.llama_cpp_normalises, bool(config.get("norm_topk_prob"))
    if does not in (None, asked) and config.get("num_experts_per_tok") != contents.num_experts:
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
    if window is not None and not reaches and not rules.llama_cpp_windows:
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
    first = next((key for key in LLAMA_CPP_COUNT_KEYS if config.get(key) is not None), None)
    asked = reader == LLAMA_CPP and rules.count_key in LLAMA_CPP_COUNT_KEYS
    if asked and first is not None and config[first] != num_experts:
        yield f"looks for {first}, which is {brief(config[first])} for {num_experts} experts"
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
                f"looks for rope_scaling, config.json has it only in rope_parameters ({kind}); "
                f"{REMEDY}"
            )
        if kind == "longrope" and ORIGINAL in parameters and ORIGINAL not in config:
            yield f"looks for {ORIGINAL} outside of rope_parameters; {REMEDY}"
