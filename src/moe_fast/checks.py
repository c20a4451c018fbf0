"""The checks that arguments go through."""

from __future__ import annotations

import functools
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from moe_fast.errors import CheckpointError, MoeConfigError

Choice = TypeVar("Choice", bound=StrEnum)


@functools.cache  # an enumeration's own search takes a tenth of a small call
def member(kind: type[Choice], value: str) -> Choice:
    return kind(value)


def as_member(value: Any, kind: type[Choice], name: str) -> Choice:
    """`value`, a member of `kind` or its string, as the member."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a {kind.__name__} or its string, got {reprlib.repr(value)}"
        )
    try:
        found: Choice = member(kind, value)
    except ValueError:
        allowed = ", ".join(repr(str(member)) for member in kind)
        raise MoeConfigError(
            f"{name} must be one of {allowed}, got {reprlib.repr(value)}"
        ) from None
    return found


Item = TypeVar("Item")
Made = TypeVar("Made")


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


def as_index(value: Any, name: str, *, minimum: int | None = 0, maximum: int | None = None) -> int:
    """`value` as a Python int from `minimum` to `maximum`, either of which may be `None`: any.

    NumPy integers pass; bools, floats and strings do not. Raises `TypeError` where `value` is no
    integer and `MoeConfigError` where it is out of range.
    """
    index = value if type(value) is int else as_integer(value, name)
    if minimum is not None and index < minimum:
        raise MoeConfigError(f"{name} must be at least {minimum}, got {shown(index)}")
    if maximum is not None and index > maximum:
        raise MoeConfigError(f"{name} must be at most {maximum}, got {shown(index)}")
    return index


def as_integer(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {reprlib.repr(value)} of type {type(value).__name__}"
        ) from None


def as_number(value: Any, name: str) -> float:
    """`value` as a float, NaN and the infinities among them; only real numbers pass.

    Raises `TypeError` where `value` is none and `MoeConfigError` where no float is that large.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {reprlib.repr(value)}") from None
    except OverflowError:
        raise MoeConfigError(f"{name} is larger than any float") from None


def shown(number: int) -> str:
    """`number` for a message. Python refuses to print an integer of more than 4300 digits."""
    if number.bit_length() <= 256:
        return str(number)
    return f"{'-' if number < 0 else ''}2**{number.bit_length() - 1} or more"


def as_choice(value: Any, choices: Sequence[str], name: str) -> str:
    """`value`, one of the strings `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {reprlib.repr(value)}")
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise MoeConfigError(f"{name} must be one of {allowed}, got {reprlib.repr(value)}")
    return value


def as_flag(value: Any, name: str) -> bool:
    """`value`, true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {reprlib.repr(value)}")
    return value


def as_fraction(value: Any, name: str) -> float:
    """`value` as a float from 0 to 1."""
    number = as_number(value, name)
    if not 0 <= number <= 1:
        raise MoeConfigError(f"{name} must be from 0 to 1, got {number}")
    return number
