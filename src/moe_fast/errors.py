"""The errors this package raises on purpose, and the checks that numbers go through."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = ["CheckpointError", "MoeConfigError", "MoeFastError", "RecipeError", "RoutingError"]

MOST_SHOWN = 100
Item = TypeVar("Item")
Made = TypeVar("Made")


class MoeFastError(Exception):
    """Base of every error that `moe_fast` defines."""


class MoeConfigError(MoeFastError, ValueError):
    """A configuration or a plan that cannot be: the message names the argument and its value."""


class CheckpointError(MoeFastError, ValueError):
    """A checkpoint that cannot be read, combined or written.

    `problems` holds every reason found, one string each; the message shows the first hundred.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"{len(self.problems)} problems:"]
        lines += [f"  - {problem}" for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"  - and {len(self.problems) - MOST_SHOWN} more")
        return "\n".join(lines)


def of_all(make: Callable[[Item], Made], items: Iterable[Item]) -> dict[Item, Made]:
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


class RoutingError(MoeFastError, ValueError):
    """Logits that cannot be routed: of the wrong shape, or with a NaN; the message says where."""


class RecipeError(CheckpointError):
    """A recipe file that cannot be followed; each problem names the file, the line and the key."""


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
