"""Texts as a model reads them: files of text, conversations, arrays of tokens.

Everything that runs a model takes its text this way: `texts=` and `tokens=` in Python, `--text` and
`--tokens` in the command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.checks import as_path
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError, Problem
from moe_fast.families.config import first_size
from moe_fast.storage.files import open_regular
from moe_fast.storage.npy import map_npy
from moe_fast.wording import brief

Tokens = npt.NDArray[np.int64]
Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Files ending in .txt, .md or .jsonl; other strings are texts themselves."""
TokenArrays = str | os.PathLike[str] | npt.ArrayLike | Sequence[npt.ArrayLike]
"""Tokens as integers, `(sequences, length)`, sequences of several lengths, or a .npy file."""
SUFFIXES = (".txt", ".md", ".jsonl")
MOST_TOGETHER = 2048  # tokens of a text that are read as one, unless the model reads fewer
LENGTH_KEYS = ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions")


class TokensInMemory(str):
    """Tokens that are no file's. As a string, which manifests keep, it says what they are."""

    sequences: tuple[Tokens, ...]

    @classmethod
    def of(cls, tokens: Any) -> TokensInMemory:
        """Those of arrays, as `given_tokens` reads them."""
        found = TokenSequences(tuple(given_tokens(tokens)))
        self = cls(f"{found.num_tokens} tokens with the SHA-256 {found.digest}")
        self.sequences = found.sequences
        return self


@dataclass(frozen=True)
class TokenSequences:
    """What a model is to read: sequences of tokens, each `(length,)`, of any lengths."""

    sequences: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def longest(self) -> int:
        return max(map(len, self.sequences))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens and of where sequences end."""
        digest = sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.astype("<i8").data)
        return digest.hexdigest()

    def batches(self, num_tokens: int) -> Iterator[list[int]]:
        """The numbers of the sequences, each once, in batches of at most `num_tokens` with padding.

        Sequences of one batch are of similar length; one that is longer is a batch by itself.
        """
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * len(self.sequences[i]) > num_tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def padded(self, batch: Sequence[int]) -> Tokens:
        """The sequences of a batch, `(batch, longest of it)`, those that are shorter padded.

        They are padded at their ends, which what stands before never attends to.
        """
        tokens = np.zeros((len(batch), max(len(self.sequences[i]) for i in batch)), np.int64)
        for row, i in enumerate(batch):
            tokens[row, : len(self.sequences[i])] = self.sequences[i]
        return tokens


def both_given() -> MoeConfigError:
    return MoeConfigError("must not be given beside tokens: one is read", argument="texts")


def read_tokens(
    folder: Path,
    config: Mapping[str, Any],
    *,
    texts: Texts | None = None,
    tokens: TokenArrays | None = None,
    length: int | None = None,
) -> TokenSequences:
    """The tokens of texts, by the tokenizer beside a model, or those that are given.

    Texts that are longer are cut every `length` tokens; no token is left out.

    Parameters
    ----------
    folder : Path
        The model's.
    config : mapping
        The language model's configuration, which says how many tokens there are, and how many the
        model reads together.
    texts : path, str or sequence of them, optional
        Files: `.txt` and `.md` hold one text, `.jsonl` one a line, under the key `text`, or
        `messages` for the tokenizer's chat template. Other strings are texts.
    tokens : array, sequence of arrays, or path, optional
        In place of texts: integers, `(sequences, length)`, sequences of several lengths, or a .npy
        file of such an array.
    length : int, optional
        By default the model's longest, and at most 2048.

    Raises
    ------
    CheckpointError
        A file that cannot be read, or without a token.
    MoeConfigError, ArgumentTypeError
        Neither texts nor tokens, or both; a token that the model does not have.
    ModuleNotFoundError
        Without tokenizers; for messages, without transformers or Jinja.
    """
    if texts is None and tokens is None:
        raise MoeConfigError("must be given, or tokens: the model reads them", argument="texts")
    if texts is not None and tokens is not None:
        raise both_given()
    longest = first_size(config, LENGTH_KEYS) or MOST_TOGETHER
    length = min(longest, MOST_TOGETHER) if length is None else min(length, longest)
    if texts is not None:
        found = list(tokens_of_texts(folder, texts))
        argument = "texts"
    else:
        found = list(given_tokens(tokens))
        argument = "tokens"
    if not sum(map(len, found)):
        raise MoeConfigError("hold no token", argument=argument)
    size = first_size(config, ("vocab_size",))
    least = min(int(each.min()) for each in found if len(each))
    greatest = max(int(each.max()) for each in found if len(each))
    if least < 0 or (size is not None and greatest >= size):
        wrong = least if least < 0 else greatest
        raise MoeConfigError(
            f"must be tokens of the model, 0 to {size - 1 if size else '...'}, got {wrong}",
            argument=argument,
        )
    pieces = (
        each[start : start + length] for each in found for start in range(0, len(each), length)
    )
    return TokenSequences(tuple(pieces))


def tokens_of_texts(folder: Path, texts: Texts) -> Iterator[Tokens]:
    """The tokens of each text."""
    if isinstance(texts, (str, os.PathLike)):
        texts = [texts]
    tokenizer = PromptTokenizer(folder, "texts")
    first = len(tokenizer.tokens(""))
    for item in texts:
        if not isinstance(item, (str, os.PathLike)):
            raise ArgumentTypeError(
                f"must be files or strings, got {brief(item)}", argument="texts"
            )
        found = 0
        for text in texts_of(item, folder):
            start = text.startswith(tokenizer.start) and bool(tokenizer.start)
            tokens = tokenizer.tokens(text.removeprefix(tokenizer.start) if start else text)
            if len(tokens) > first:
                found += 1
                yield np.array(tokens, np.int64)
        if not found:
            if is_file(item):
                raise CheckpointError("holds no text with a token", file=item)
            raise MoeConfigError(f"holds a text without a token: {brief(item)}", argument="texts")


def is_file(item: str | os.PathLike[str]) -> bool:
    """Whether this is a file, not a text: no text is one line that ends as names of files do."""
    return not isinstance(item, str) or ("\n" not in item and item.endswith(SUFFIXES))


def texts_of(item: str | os.PathLike[str], folder: Path) -> Iterator[str]:
    """The texts of a file, or the text that is one."""
    if isinstance(item, str) and not is_file(item):
        yield item
        return
    path = as_path(item, "texts")
    if path.suffix not in SUFFIXES:
        raise MoeConfigError(
            f"must be files ending in {', '.join(SUFFIXES)}, got {path}", argument="texts"
        )
    with open_regular(path) as stream:
        data = stream.readall()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError("is not text in UTF-8", file=path) from None
    if path.suffix != ".jsonl":
        yield text
        return
    render = ChatTemplate(folder)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield text_of_line(line, path, number, render)


def text_of_line(line: str, path: Path, number: int, render: ChatTemplate) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        try:
            return render(value["messages"])
        except CheckpointError as error:
            what = Problem(f"messages: {error}", file=path, line=number)
            raise CheckpointError(what) from None
    raise CheckpointError(
        Problem(
            "must be an object with the key 'text', a string, or 'messages', a list",
            file=path,
            line=number,
        )
    )


class ChatTemplate:
    """The chat template beside a model, which transformers runs in Jinja's sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = None

    def __call__(self, messages: Sequence[Any]) -> str:
        """A conversation as one text.

        Raises
        ------
        CheckpointError
            A model without a template, or one that refuses the conversation.
        ModuleNotFoundError
            Without transformers or Jinja.
        """
        if self.tokenizer is None:
            try:
                import jinja2  # noqa: F401
                from transformers import AutoTokenizer
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"messages need {error.name}: pip install 'moe-fast[calibration]'",
                    name=error.name,
                ) from None
            load: Any = AutoTokenizer.from_pretrained
            try:
                self.tokenizer = load(
                    str(self.folder), local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # tokenizers raise what they like
                raise CheckpointError(f"transformers reads no tokenizer: {error}") from None
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False))
        except Exception as error:  # and so do templates
            raise CheckpointError(
                f"the chat template of {self.folder} does not take them: {error}"
            ) from None


def given_tokens(tokens: Any) -> Iterator[Tokens]:
    """Tokens that are given as integers, a sequence at a time."""
    if isinstance(tokens, TokensInMemory):
        yield from tokens.sequences
        return
    if isinstance(tokens, (str, os.PathLike)):
        path = as_path(tokens, "tokens")
        array = map_npy(path)
        try:
            yield from rows_of(array)
        except MoeConfigError as error:
            raise CheckpointError(error.problems[0].what, file=path) from None
        return
    if hasattr(tokens, "shape") or not isinstance(tokens, Sequence):
        yield from rows_of(np.asarray(tokens))
        return
    if all(isinstance(each, (int, np.integer)) for each in tokens):
        yield from rows_of(np.array(tokens, np.int64 if len(tokens) == 0 else None))
        return
    for each in tokens:
        array = np.asarray(each)
        if array.ndim != 1:
            raise MoeConfigError(
                f"must be sequences of integers, got one of shape {array.shape}", argument="tokens"
            )
        yield from rows_of(array if array.size else array.astype(np.int64))


def rows_of(array: npt.NDArray[Any]) -> Iterator[Tokens]:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise MoeConfigError(
            f"must be integers of shape [sequences, length], got {array.dtype} of shape "
            f"{list(array.shape)}",
            argument="tokens",
        )
    for row in array if array.ndim == 2 else array[None]:
        yield np.array(row, np.int64)
