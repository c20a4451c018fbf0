"""Numbers and values as messages and reports say them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

BRIEFLY = reprlib.Repr()
BRIEFLY.maxstring = BRIEFLY.maxother = 200


def brief(value: Any) -> str:
    """`value` for a message, however long it is and whatever is in it."""
    return BRIEFLY.repr(value)


def brief_number(number: int) -> str:
    """An integer for a message. Python refuses to print one of more than 4300 digits."""
    if number.bit_length() <= 256:
        return str(number)
    return f"{'-' if number < 0 else ''}2**{number.bit_length() - 1} or more"


def format_count(number: int, noun: str) -> str:
    """`1 file`, `3 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_quantity(number: int, unit: str = "") -> str:
    """`1.38 G` for 1380000000, with the unit `B` `1.38 GB`: decimal, as disks and hubs count."""
    scaled = float(number)
    for prefix in ("", "k", "M", "G", "T"):
        if scaled < 999.5 or prefix == "T":
            break
        scaled /= 1000
    return f"{scaled:.3g} {prefix}{unit}".rstrip()


def format_range(values: Sequence[float], digits: int = 3) -> str:
    """The range of some numbers: `0.031`, or `0.031 to 0.042`."""
    ends = (min(values), max(values))
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in ends))


def format_numbers(noun: str, numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0-4, 7`."""
    return f"{noun if len(numbers) == 1 else noun + 's'} {format_runs(numbers)}"


def format_runs(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def name_layer(layer: int, num_layers: int) -> str:
    """A layer's number; `mtp.0`, ... for those for multi-token prediction, which come last."""
    return f"{layer}" if layer < num_layers else f"mtp.{layer - num_layers}"
