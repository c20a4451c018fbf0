"""Which tokens rows are made from, and which are left to judge them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_fast.calibration.texts import TokenArrays, Tokens, TokenSequences, read_tokens
from moe_fast.errors import MoeConfigError

LENGTH = 256  # tokens that are read together: many short pieces have more kinds of text in them
LEAST_USED = 8192
MOST_USED, USED_PER_EXPERT = 32_768, 256  # more experts get less each, and at least:
LEAST_PER_EXPERT = 40
FEWEST_PER_EXPERT = 20
FEWEST_DISTINCT = 16
HELD_OUT = 0.25  # of the tokens used, if the texts have as many more


@dataclass(frozen=True)
class Selection:
    """Sequences of tokens, first those that rows are made from, then those held out."""

    sequences: tuple[Tokens, ...]
    num_used: int
    """Tokens, not sequences."""

    @property
    def num_held_out(self) -> int:
        return sum(map(len, self.sequences)) - self.num_used


def select_tokens(
    folder: Path,
    config: Mapping[str, Any],
    num_experts: int,
    *,
    texts: Sequence[str] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
) -> Selection:
    """Read texts, and choose pieces of them that are spread evenly.

    Parameters
    ----------
    folder, config
        Those of the model that reads them.
    num_experts : int
        The experts that rows are made for.
    texts, tokens
        As `read_tokens` has them.
    tokens_used : int, optional
        By default 256 for each expert, from 8192 to 32,768, and never fewer than 40 for each.

    Raises
    ------
    MoeConfigError
        Fewer than 20 tokens for each expert, or hardly any that differ.
    CheckpointError, ModuleNotFoundError
        As `read_tokens` does.
    """
    argument = "texts" if tokens is None else "tokens"
    given: dict[str, Any] = {"tokens": tokens} if tokens is not None else {"texts": list(texts)}
    found = read_tokens(folder, config, length=LENGTH, **given)
    fewest = FEWEST_PER_EXPERT * num_experts
    for name, number in ((argument, found.num_tokens), ("tokens_used", tokens_used)):
        if number is not None and number < fewest:
            raise MoeConfigError(
                f"must be at least {fewest:,} tokens, {FEWEST_PER_EXPERT} for each of "
                f"{num_experts} experts, got {number:,}",
                argument=name,
            )
    distinct = len(np.unique(np.concatenate(found.sequences)))
    if distinct < min(num_experts, FEWEST_DISTINCT):
        raise MoeConfigError(
            f"must vary, for {num_experts} experts to be told apart: {found.num_tokens:,} tokens "
            f"have {distinct} different ones",
            argument=argument,
        )
    wanted = min(max(LEAST_USED, USED_PER_EXPERT * num_experts), MOST_USED)
    count = tokens_used or max(wanted, LEAST_PER_EXPERT * num_experts)
    used, rest = spread(found, count)
    held_out, _ = spread(rest, int(HELD_OUT * used.num_tokens))
    return Selection((*used.sequences, *held_out.sequences), used.num_tokens)


def spread(found: TokenSequences, count: int) -> tuple[TokenSequences, TokenSequences]:
    """`count` tokens of sequences taken at equal distances, and the sequences that are left."""
    total = found.num_tokens
    if count >= total:
        return found, TokenSequences(())
    taken: list[Tokens] = []
    left: list[Tokens] = []
    seen = chosen = 0
    for sequence in found.sequences:
        seen += len(sequence)
        missing = seen * count / total - chosen
        if 2 * missing >= len(sequence) or (seen == total and chosen < count):
            part = sequence[: count - chosen]
            if len(part):
                taken.append(part)
                chosen += len(part)
                continue
        left.append(sequence)
    return TokenSequences(tuple(taken)), TokenSequences(tuple(left))
