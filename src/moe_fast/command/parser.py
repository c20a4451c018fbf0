"""Command lines that are right and plain, parsed at once; about all others, typer is asked.

A third of the start of a command would be typer's, and of what it brings along. Both parsers agree
(`tests/test_options.py`). Values that cannot be right are refused here, in the package's words;
typer reports everything else that is wrong.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import Any

from moe_fast.checks import as_member
from moe_fast.command.declaration import Argument, Command, Parameter
from moe_fast.errors import MoeConfigError
from moe_fast.wording import brief

INTEGER = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?(e-?[0-9]{1,2})?")


def parse(command: Command, words: Sequence[str]) -> dict[str, Any] | None:
    """The values that `words` give to parameters; `None` if they are not right and plain.

    Raises
    ------
    MoeConfigError
        A value that cannot be right, in a line that does not ask for help.
    """
    named = {name: p for p in command.parameters for name in (*p.opts, *p.off_opts)}
    arguments = [p for p in command.parameters if isinstance(p.declared, Argument)]
    values: dict[str, Any] = {}
    places: list[str] = []
    rest = iter(words)
    try:
        for word in rest:
            if not word.startswith("-"):
                places.append(word)
                continue
            name, equals, text = word.partition("=")
            parameter = named[name]
            if parameter.kind is bool:
                if equals or parameter.name in values:
                    return None
                values[parameter.name] = name in parameter.opts
                continue
            if equals and not name.startswith("--"):  # a value right behind a letter
                return None
            store(values, parameter, text if equals else next(rest))
        if len(arguments) == 1 and arguments[0].is_list:
            arguments *= len(places)
        for parameter, place in zip(arguments, places, strict=False):
            store(values, parameter, place)
    except MoeConfigError:
        if {"--help", "-h"} & set(words):
            return None
        raise
    except (KeyError, ValueError, StopIteration):
        return None
    missing = any(p.default is ... and p.name not in values for p in command.parameters)
    return None if missing or len(places) > len(arguments) else values


def store(values: dict[str, Any], parameter: Parameter, text: str) -> None:
    """Add what `text` says to the values; `ValueError` if typer has to read it."""
    value = read(parameter, text)
    if parameter.is_list:
        values.setdefault(parameter.name, []).append(value)
    elif parameter.name in values:
        raise ValueError(text)
    else:
        values[parameter.name] = value


def read(parameter: Parameter, text: str) -> Any:
    kind = parameter.kind
    if kind in (int, float):
        return read_number(parameter, text)
    if not text or text.startswith("-"):
        raise ValueError(text)
    if issubclass(kind, enum.StrEnum):
        return as_member(text, kind, parameter.name)
    return kind(text)  # a string or a path


def read_number(parameter: Parameter, text: str) -> int | float:
    is_integer = parameter.kind is int
    try:
        number: int | float = parameter.kind(text)
    except ValueError:
        what = "an integer" if is_integer else "a number"
        raise MoeConfigError(
            f"must be {what}, got {brief(text)}", argument=parameter.name
        ) from None
    if not (INTEGER if is_integer else NUMBER).fullmatch(text):
        raise ValueError(text)
    if is_integer and parameter.declared.min is not None and number < parameter.declared.min:
        raise MoeConfigError(
            f"must be at least {parameter.declared.min}, got {number}", argument=parameter.name
        )
    return number
