"""Dataclasses as plain values, as JSON and YAML have them, and back, every type checked."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_fast.errors import MoeConfigError, MoeFastError
from moe_fast.wording import brief

__all__ = ["Mistakes", "check_keys", "decode", "join_place", "plain", "typed"]

Mistakes = list[tuple[str, str]]
"""Places, as in `experts[0].noise_scale`, and what is wrong there."""
MOST_MISTAKES = 100

# A longer `range` keeps its two ends alone: written out, it may be longer than memory.
LONGEST_RANGE = 2**20
IN_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "a bool", Path: "a path"}


def plain(value: Any) -> Any:
    """`value` in dicts, lists, strings, numbers and `None`."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, range) and value.stop - value.start > LONGEST_RANGE:
        return {"start": value.start, "stop": value.stop}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def typed(value: Any, kind: Any, where: str) -> Any:
    """The object of type `kind` that `value` holds in plain values.

    `kind` is a dataclass, `tuple[X, ...]`, `tuple[X, Y]`, `Sequence[X]`, `Mapping[str, X]`,
    `dict[str, X]`, a `StrEnum`, a `Literal` of strings, `Path`, `X | None`, `Any`, or one of `str`,
    `int`, `float`, `bool`. With `Annotated[X, read]`, the function `read` gets the plain value
    first, and what it returns is decoded as `X`; it raises a `MoeFastError` for what it refuses.

    Raises
    ------
    MoeConfigError
        With every mistake, a line for each; it begins with the place, `where` and the keys to it.
    """
    mistakes: Mistakes = []
    decoded = decode(value, kind, where, mistakes)
    raise_mistakes(mistakes)
    return decoded


def check_keys(
    values: Mapping[str, Any], known: Collection[str], required: Collection[str], where: str
) -> None:
    """Raise `MoeConfigError` if a key is unknown or missing."""
    raise_mistakes(find_wrong_keys(values, known, required, where))


def raise_mistakes(mistakes: Mistakes) -> None:
    if mistakes:
        first = mistakes[:MOST_MISTAKES]
        raise MoeConfigError(*(f"{where}: {text}" if where else text for where, text in first))


def decode(value: Any, kind: Any, where: str, mistakes: Mistakes) -> Any:
    """As `typed`, but mistakes are added to `mistakes`; the result has no meaning if any are."""
    arguments, origin = get_args(kind), get_origin(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        try:
            value = arguments[1](value)
        except MoeFastError as error:
            mistakes.append((where, str(error)))
            return None
        return decode(value, arguments[0], where, mistakes)
    if origin in (types.UnionType, Union):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return decode(value, kind, where, mistakes)
    if origin in (tuple, Sequence) and isinstance(value, list):
        kinds = arguments
        if origin is Sequence or arguments[1:] == (...,):
            kinds = arguments[:1] * len(value)
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(decode(item, k, f"{where}[{i}]", mistakes) for i, (item, k) in pairs)
    if origin is Sequence and isinstance(value, dict) and set(value) == {"start", "stop"}:
        start, stop = (decode(value[k], int, f"{where}.{k}", mistakes) for k in ("start", "stop"))
        return None if None in (start, stop) else range(start, stop)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {
            key: decode(item, arguments[1], join_place(where, key), mistakes)
            for key, item in value.items()
        }
    if is_dataclass(kind) and isinstance(value, dict):
        return decode_fields(value, kind, where, mistakes)
    if isinstance(value, str) and kind is Path:
        return Path(value)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        arguments = tuple(kind)
        with contextlib.suppress(ValueError):
            return kind(value)
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    quotes = kind is str and not isinstance(value, (list, dict, types.NoneType))
    advice = "; put it in quotes" if quotes else ""
    mistakes.append(
        (where, f"must be {describe_type(kind, arguments)}, got {describe_value(value)}{advice}")
    )
    return None


def decode_fields(value: Mapping[str, Any], kind: Any, where: str, mistakes: Mistakes) -> Any:
    """The dataclass `kind` with these values for its fields."""
    known = {each.name: each for each in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    required = [
        name
        for name, each in known.items()
        if each.default is MISSING and each.default_factory is MISSING
    ]
    wrong = find_wrong_keys(value, known, required, where)
    decoded = {
        key: decode(value[key], hints[key], join_place(where, key), wrong)
        for key in known
        if key in value
    }
    if not wrong:
        try:
            return kind(**decoded)
        except (TypeError, MoeConfigError) as error:
            wrong.append((where, str(error)))
    mistakes += wrong
    return None


def find_wrong_keys(
    values: Mapping[str, Any], known: Collection[str], required: Collection[str], where: str
) -> Mistakes:
    mistakes = [(where, f"the key {key!r} is missing") for key in required if key not in values]
    unknown = (key for key in values if key not in known)
    for key in itertools.islice(unknown, MOST_MISTAKES):  # finding similar keys takes long
        close = difflib.get_close_matches(str(key), known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        mistakes.append((join_place(where, key), f"unknown key; {advice}"))
    return mistakes


def describe_type(kind: Any, arguments: Sequence[Any]) -> str:
    """A type as messages name it."""
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return f"one of {', '.join(arguments)}"
    if get_origin(kind) is tuple and arguments[1:] != (...,):
        return f"a list of {len(arguments)} values"
    if get_origin(kind) in (tuple, Sequence):
        return "a list"
    return IN_WORDS.get(kind, "a mapping")


def describe_value(value: Any) -> str:
    """A plain value for a message, however long it is."""
    return "null" if value is None else brief(value)


def join_place(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
