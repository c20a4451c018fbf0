"""The checks that arguments go through."""

from __future__ import annotations

import functools
import operator
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError
from moe_fast.wording import brief_number

Choice = TypeVar("Choice", bound=StrEnum)
Item = TypeVar("Item")
Made = TypeVar("Made")

SIZE = re.compile(
    r"(?P<number>\d{1,20}(?:\.\d{1,20})?)\s*(?P<unit>(?P<prefix>[KMGT]?)(?P<binary>i?)B?)", re.I
)
# Someone who types 5 means gigabytes. A size with a unit is meant, however small.
SMALLEST_SIZE_WITHOUT_UNIT = 1_000_000
LARGEST_SIZE = 2**63 - 1


@functools.cache  # an enumeration's own search takes a tenth of a small call
def member(kind: type[Choice], value: str) -> Choice:
    return kind(value)


def as_member(value: Any, kind: type[Choice], name: str) -> Choice:
    """`value`, a member of `kind` or its string, as the member."""
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"must be a {kind.__name__} or its string, got {reprlib.repr(value)}", argument=name
        )
    try:
        found: Choice = member(kind, value)
    except ValueError:
        raise unknown_choice(value, list(kind), name) from None
    return found


def as_choice(value: Any, choices: Sequence[str], name: str) -> str:
    """`value`, one of the strings `choices`."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"must be a string, got {reprlib.repr(value)}", argument=name)
    if value not in choices:
        raise unknown_choice(value, choices, name)
    return value


def unknown_choice(value: object, choices: Sequence[str], name: str) -> MoeConfigError:
    from difflib import get_close_matches  # which nothing needs that goes well

    names = [str(choice) for choice in choices]
    close = get_close_matches(str(value)[:100], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return MoeConfigError(
        f"must be one of {', '.join(map(repr, names))}, got {reprlib.repr(value)}{hint}",
        argument=name,
    )


def as_index(value: Any, name: str, *, minimum: int | None = 0, maximum: int | None = None) -> int:
    """`value` as a Python int from `minimum` to `maximum`; `None` means no limit.

    NumPy integers pass; bools, floats and strings do not.

    Raises
    ------
    ArgumentTypeError
        No integer.
    MoeConfigError
        Out of range.
    """
    index = value if type(value) is int else as_integer(value, name)
    if minimum is not None and index < minimum:
        raise MoeConfigError(
            f"must be at least {minimum}, got {brief_number(index)}", argument=name
        )
    if maximum is not None and index > maximum:
        raise MoeConfigError(f"must be at most {maximum}, got {brief_number(index)}", argument=name)
    return index


def as_integer(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"must be an integer, got {reprlib.repr(value)} of type {type(value).__name__}",
            argument=name,
        ) from None


def as_number(value: Any, name: str) -> float:
    """`value` as a float; NaN and the infinities pass, strings and bools do not.

    Raises
    ------
    ArgumentTypeError
        No real number.
    MoeConfigError
        Larger than any float.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"must be a number, got {reprlib.repr(value)}", argument=name
        ) from None
    except OverflowError:
        raise MoeConfigError("is larger than any float", argument=name) from None


def as_size(value: Any, name: str) -> int:
    """`value` in bytes: `5_000_000_000`, `5e9`, `"5GB"`, `"500MB"`, `"5GiB"` are all sizes.

    Raises
    ------
    ArgumentTypeError
        Neither a number nor a string.
    MoeConfigError
        A string that is not a size, or less than a megabyte without a unit.
    """
    number, unit = value, ""
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        if match is None:
            raise MoeConfigError(
                f"must be a size such as '500MB', '5GB' or '5GiB', got {reprlib.repr(value)}",
                argument=name,
            )
        base = 1024 if match["binary"] else 1000
        number = float(match["number"]) if "." in match["number"] else int(match["number"])
        number *= base ** " KMGT".index(match["prefix"].upper() or " ")
        unit = match["unit"]
    if isinstance(value, str) or (isinstance(value, float) and value.is_integer()):
        number = int(number)
    size = as_index(number, name, minimum=None, maximum=LARGEST_SIZE)
    if size < SMALLEST_SIZE_WITHOUT_UNIT and not unit:
        example = size if size > 0 else 5
        raise MoeConfigError(
            f"must be at least 1 MB, got {brief_number(size)}; write '{example}GB' for gigabytes, "
            f"or '{example}B' if you mean bytes",
            argument=name,
        )
    if size < 1:
        raise MoeConfigError(f"must be at least one byte, got {value!r}", argument=name)
    return size


def as_path(value: Any, name: str) -> Path:
    """`value`, a string or a path, as a `Path`; `~` at its beginning is the user's home.

    Raises
    ------
    ArgumentTypeError
        Neither a string nor a path of strings.
    """
    return Path(as_path_text(value, name))


def as_path_text(value: Any, name: str) -> str:
    """`value`, a string or a path, as a string; `~` at its beginning is the user's home."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise ArgumentTypeError(f"must be a path, got {reprlib.repr(value)}", argument=name)
    # pathlib would raise RuntimeError for a user who is not known; then the folder is called so.
    return os.path.expanduser(text)  # noqa: PTH111


def collect(make: Callable[[Item], Made], items: Iterable[Item]) -> dict[Item, Made]:
    """What `make` gives of each item, once each, by the item; the problems of all of them at once.

    Raises
    ------
    CheckpointError
        With every problem of those that `make` raised.
    """
    made: dict[Item, Made] = {}
    problems: list[str] = []
    for item in dict.fromkeys(items):
        try:
            made[item] = make(item)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return made


def as_flag(value: Any, name: str) -> bool:
    """`value`, true or false."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"must be True or False, got {reprlib.repr(value)}", argument=name)
    return value


def as_fraction(value: Any, name: str) -> float:
    """`value` as a float from 0 to 1."""
    number = as_number(value, name)
    if not 0 <= number <= 1:
        raise MoeConfigError(f"must be from 0 to 1, got {number}", argument=name)
    return number
