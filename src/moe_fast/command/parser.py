"""Command lines that are right and plain, parsed at once; about all others, typer is asked.

A third of the start of a command would be typer's, and of what it brings along. Both parsers agree
(`tests/test_options.py`), and this one gives up wherever anything is to be said to the user.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_fast.command.declaration import Argument, Command, Parameter

INTEGER = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?(e-?[0-9]{1,2})?")


def parse(command: Command, words: Sequence[str]) -> dict[str, Any] | None:
    """The values that `words` give to parameters; `None` if they are not right and plain."""
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
    except (KeyError, ValueError, StopIteration):
        return None
    missing = any(p.default is ... and p.name not in values for p in command.parameters)
    return None if missing or len(places) > len(arguments) else values


def store(values: dict[str, Any], parameter: Parameter, text: str) -> None:
    """Add what `text` says to the values; `ValueError` if it is not plain."""
    value = read(parameter, text)
    if parameter.is_list:
        values.setdefault(parameter.name, []).append(value)
    elif parameter.name in values:
        raise ValueError(text)
    else:
        values[parameter.name] = value


def read(parameter: Parameter, text: str) -> Any:
    kind = parameter.kind
    if not text or text.startswith("-"):
        raise ValueError(text)
    if kind is str:
        return text
    if kind is Path:
        return Path(text)
    if kind is float and NUMBER.fullmatch(text):
        return float(text)
    if kind is int and INTEGER.fullmatch(text):
        number = int(text)
        if parameter.declared.min is None or number >= parameter.declared.min:
            return number
    if issubclass(kind, enum.Enum):
        return kind(text)
    raise ValueError(text)
