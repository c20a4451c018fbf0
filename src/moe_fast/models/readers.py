"""What readers meet in a checkpoint besides its config.json, and what to warn of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.readers import Contents, find_readers, is_beyond
from moe_fast.families.registry import moe_families
from moe_fast.models.moe import MoeModel
from moe_fast.storage.companions import find_missing_code, has_tokenizer
from moe_fast.storage.files import open_regular
from moe_fast.storage.strict_json import LARGEST_SIZE, LONGEST_INDEX, is_size, read_json
from moe_fast.storage.tensors import Weight

EMBEDDINGS = ("model.embed_tokens.weight", "backbone.embeddings.weight")
HEAD = "lm_head.weight"
VOCABULARY, LIST = b'"vocab"', re.compile(rb"[ \t\r\n]*:[ \t\r\n]*\[")
CHUNK = 16 * 1024 * 1024


def contents_of(
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    folder: Path,
    *,
    layout: str,
    num_experts: int,
) -> Contents:
    """The contents of a checkpoint of these weights, whose tokenizer lies in `folder`.

    Weights are read only if a head is stored that should be the embedding.
    """
    return Contents(
        layout=layout,
        num_experts=num_experts,
        has_tokenizer=has_tokenizer(folder),
        has_sentencepiece=(folder / "tokenizer.model").is_file(),
        largest_token=find_token_beyond(folder, config.get("vocab_size")),
        added_tokens=find_added_tokens(folder) if asks_for_tokens(config) else frozenset(),
        has_head=HEAD in weights,
        has_other_head=has_other_head(config, weights),
        missing_code=tuple(find_missing_code(folder, config)),
        missing_tokenizer_code=tuple(find_missing_code(folder)),
    )


def contents_of_model(model: MoeModel) -> Contents:
    """The contents of a checkpoint on disk."""
    tensors = model.tensors
    stored = {n: Weight.of(tensors[n]) for n in (*EMBEDDINGS, HEAD) if n in tensors}
    contents = contents_of(
        model.config, stored, model.path, layout=model.layout, num_experts=model.num_experts
    )
    return replace(contents, other_names=find_other_names(model))


def find_other_names(model: MoeModel) -> tuple[tuple[str, str], ...]:
    """The names of tensors that are not those readers look for, each with the one that is."""
    return tuple((t.name, name) for name, t in model.tensors.items() if t.name != name)


def warn_of_readers(config: Mapping[str, Any], contents: Contents, folder: Path) -> Iterator[str]:
    """What readers make of a checkpoint otherwise than its maker may expect.

    `folder` has the tokenizer, and the config.json from which `config` has its keys.
    """
    readers = find_readers(config, contents)
    if readers and not any(reader.loads for reader in readers):
        reasons = "; ".join(f"{r.name} {' and '.join(r.reasons)}" for r in readers)
        yield f"no reader loads a {config['model_type']} made of {folder}: {reasons}"
    file, rows = folder / "config.json", config.get("vocab_size")
    if contents.has_other_head:
        yield (
            f"{file}: tie_word_embeddings is true, and {HEAD} is not the embedding: "
            "transformers 4 takes the embedding, other readers the stored head; write false if the "
            "head is meant, or else remove it"
        )
    if rows is None or not is_size(rows):
        return
    pad, largest = config.get("pad_token_id"), contents.largest_token
    family = moe_families().get(str(config.get("model_type")))
    if (family is None or family.pads) and is_beyond(pad, rows):
        yield (
            f"{file}: pad_token_id is {pad}, the embedding has {rows} rows: transformers "
            "does not load that; write null or a token of the vocabulary"
        )
    if largest is not None and largest >= rows:
        yield (
            f"{folder}: the tokenizer has tokens up to {largest}, the embedding has {rows} rows: "
            "readers fail on a text with such tokens, llama.cpp on the whole model"
        )


def has_other_head(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> bool:
    """Whether `config` ties the head to the embedding, and another head is stored."""
    if config.get("tie_word_embeddings") is not True or HEAD not in weights:
        return False
    found = [weights[name] for name in EMBEDDINGS if name in weights]
    return any(not hold_the_same(weights[HEAD], embedding) for embedding in found)


def hold_the_same(first: Weight, second: Weight) -> bool:
    """Whether two weights have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    ranges = ((start, start + CHUNK) for start in range(0, first.nbytes, CHUNK))
    return all(b"".join(first.read(*r)) == b"".join(second.read(*r)) for r in ranges)


def find_token_beyond(folder: Path, num_rows: Any) -> int | None:
    """The largest token of the tokenizer in a folder, if an embedding of `num_rows` lacks it."""
    if not is_size(num_rows):
        return None
    found = [*tokens_of_config(read_or_none(folder / "tokenizer_config.json"))]
    if may_have_tokens_beyond(folder / "tokenizer.json", num_rows):
        found += tokens_of_tokenizer(read_or_none(folder / "tokenizer.json"))
    for name in ("added_tokens.json", "vocab.json"):
        if may_have_tokens_beyond(folder / name, num_rows):
            found += values_of(read_or_none(folder / name))
    tokens = [token for token in found if type(token) is int and 0 <= token <= LARGEST_SIZE]
    return max((token for token in tokens if token >= num_rows), default=None)


def may_have_tokens_beyond(file: Path, num_rows: int) -> bool:
    """Whether a JSON file of a tokenizer has to be parsed to know that.

    A vocabulary and its merges are megabytes, and parsing them would take as long as all else that
    a dry run does. Where tokens are values, no token is beyond the embedding if no number is that
    stands behind a colon. In a list (Unigram), a token is its place, which shows no number.
    """
    try:
        with open_regular(file) as stream:
            text = stream.read(LONGEST_INDEX + 1)
    except (CheckpointError, OSError):
        return False
    place = text.find(VOCABULARY)
    while place >= 0:
        if LIST.match(text, place + len(VOCABULARY)):
            return True
        place = text.find(VOCABULARY, place + 1)
    return re.search(rb":[ \t\r\n]*(?:%s)" % numbers_from(num_rows), text) is not None


def numbers_from(least: int) -> bytes:
    """A pattern for the decimal numbers that are no smaller, without going through all others."""
    digits = str(least)
    longer = [f"[0-9]{{{len(digits) + 1}}}"]
    larger = [
        f"{digits[:i]}[{int(digit) + 1}-9][0-9]{{{len(digits) - i - 1}}}"
        for i, digit in enumerate(digits)
        if digit != "9"
    ]
    return "|".join([*longer, *larger, digits]).encode()


def asks_for_tokens(config: Mapping[str, Any]) -> bool:
    """Whether a reader of the family looks for certain tokens."""
    model_type = config.get("model_type")
    family = moe_families().get(model_type) if isinstance(model_type, str) else None
    return family is not None and bool(family.rules.llama_cpp_tokens)


def find_added_tokens(folder: Path) -> frozenset[str]:
    """The tokens that the tokenizer.json of a folder has beside its vocabulary."""
    tokenizer = read_or_none(folder / "tokenizer.json")
    added = tokenizer.get("added_tokens") if isinstance(tokenizer, Mapping) else None
    texts = [t.get("content") for t in added or () if isinstance(t, Mapping)]
    return frozenset(text for text in texts if isinstance(text, str))


def find_other_token(folder: Path, other: Path) -> str | None:
    """A token that the tokenizers of two folders number differently; `None` if none is known."""
    first, second = (vocabulary_of(each) for each in (folder, other))
    if not first or not second:
        return None
    return next((token for token in first if first[token] != second.get(token)), None)


def vocabulary_of(folder: Path) -> dict[str, int]:
    """The numbers of the tokens in a tokenizer.json, as far as they are plain to see."""
    tokenizer = read_or_none(folder / "tokenizer.json")
    model = tokenizer.get("model") if isinstance(tokenizer, Mapping) else None
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    pieces = vocabulary if isinstance(vocabulary, list) else []  # Unigram: a token is its place
    texts = [piece[0] if isinstance(piece, list) and piece else None for piece in pieces]
    return {text: number for number, text in enumerate(texts) if isinstance(text, str)}


def read_or_none(file: Path) -> Any:
    """A JSON file of a tokenizer; `None` if there is none, or it cannot be read."""
    try:
        return read_json(file, limit=LONGEST_INDEX) if file.is_file() else None
    except (CheckpointError, OSError):  # copied as it is; whoever reads it will say so
        return None


def tokens_of_tokenizer(tokenizer: Any) -> Iterator[Any]:
    """The tokens in a tokenizer.json."""
    if not isinstance(tokenizer, Mapping):
        return
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list) and vocabulary:  # Unigram: a token is its place
        yield len(vocabulary) - 1
    yield from values_of(vocabulary)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            yield token.get("id")


def tokens_of_config(config: Any) -> Iterator[int]:
    """The tokens that a tokenizer_config.json adds, which are keys there."""
    added = config.get("added_tokens_decoder") if isinstance(config, Mapping) else None
    for key in added if isinstance(added, Mapping) else ():
        if key.isascii() and key.isdigit() and len(key) < 20:
            yield int(key)


def values_of(mapping: Any) -> Iterator[Any]:
    yield from mapping.values() if isinstance(mapping, Mapping) else ()
