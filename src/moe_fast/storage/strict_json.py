"""JSON that others wrote, read strictly and within bounds; JSON of ours, written."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.storage.files import open_regular
from moe_fast.wording import brief as brief

LONGEST_INDEX = 100_000_000
LONGEST_CONFIG = 10_000_000
# JSON takes up to thirty times its size as Python objects. What follows bounds that, far above what
# models have: the largest known has some 200,000 tensors, in dozens of files.
MOST_MARKS = 4_000_000  # commas and opening brackets; a tensor of a header has about ten
LARGEST_SIZE = 2**63 - 1


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def read_json(path: Path, limit: int = LONGEST_CONFIG) -> Any:
    """The JSON of a file of at most `limit` bytes, as `parse_json` reads it."""
    with open_regular(path) as stream:
        text = stream.read(limit + 1)
    if len(text) > limit:
        raise CheckpointError(f"is longer than {limit} bytes", file=path)
    return parse_json(text, path)


def json_text(value: Any) -> str:
    """A value as the text of one of the output's JSON files."""
    return json.dumps(value, indent=2) + "\n"


def parse_json(text: bytes, path: Path) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN, no number that is infinite, and not too much of it.

    Raises `CheckpointError` with `path` where `text` is none, or where it has more than
    `MOST_MARKS` commas and opening brackets, each of which can become an object of Python's.
    """
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_MARKS:
        raise CheckpointError("holds more JSON than any model's", file=path)
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"not UTF-8: {error.reason} at byte {error.start}", file=path
        ) from None
    except RecursionError:
        raise CheckpointError("not valid JSON: nested too deep", file=path) from None
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", file=path) from None


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {brief(twice)} stands twice")
    return keys


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {brief(text)} is too large")
    return number
