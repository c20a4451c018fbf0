"""Dataclasses as plain values, as JSON has them, and back, every type checked."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_fast.errors import MoeConfigError

__all__ = ["plain", "typed"]

# A longer `range` keeps its two ends alone: written out, it may be longer than memory.
LONGEST_RANGE = 2**20


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
    """`value`, in plain values, as `kind`; `MoeConfigError` beginning with `where` if it is none.

    `kind` is a dataclass, `tuple[X, ...]`, `tuple[X, Y]`, `Sequence[X]`, `Mapping[str, X]`,
    `dict[str, X]`, a `StrEnum`, a `Literal` of strings, `Path`, `X | None`, `Any`, or one of `str`,
    `int`, `float`, `bool`.
    """
    arguments, origin = get_args(kind), get_origin(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise MoeConfigError(f"{where}: {value!r} is none of {', '.join(arguments)}")
    if origin in (types.UnionType, Union):
        if value is None and types.NoneType in arguments:
            return value
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return typed(value, kind, where)
    if origin in (tuple, Sequence) and isinstance(value, list):
        kinds = arguments
        if origin is Sequence or arguments[1:] == (...,):
            kinds = arguments[:1] * len(value)
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(typed(item, each, f"{where}[{i}]") for i, (item, each) in pairs)
    if origin is Sequence and isinstance(value, dict) and set(value) == {"start", "stop"}:
        return range(*(typed(value[end], int, f"{where}.{end}") for end in ("start", "stop")))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: typed(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return typed_fields(value, kind, where)
    if isinstance(kind, type) and isinstance(value, str):
        if issubclass(kind, StrEnum):
            if value in list(kind):
                return kind(value)
            raise MoeConfigError(f"{where}: {value!r} is none of {', '.join(kind)}")
        if kind is Path:
            return Path(value)
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    expected = "an object" if is_dataclass(kind) else str(kind) if arguments else kind.__name__
    raise MoeConfigError(f"{where}: {value!r} is not {expected}")


def typed_fields(value: Mapping[str, Any], kind: Any, where: str) -> Any:
    """The dataclass `kind` with these values for its fields."""
    known = {each.name: each for each in fields(kind)}
    for key in value:
        if key not in known:
            raise MoeConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
    for name, each in known.items():
        if name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise MoeConfigError(f"{where}: the key {name!r} is missing")
    hints = get_type_hints(kind)
    read = {name: typed(item, hints[name], f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**read)
    except (TypeError, MoeConfigError) as error:
        raise MoeConfigError(f"{where}: {error}") from None
