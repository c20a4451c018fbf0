"""Every kind of field becomes plain values, and comes back from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest

from moe_fast import MoeConfigError
from moe_fast.plain import plain, typed


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Nested:
    scale: float
    names: dict[str, tuple[int, ...]]
    note: str | None = None
    color: Color = Color.RED
    path: Path = Path("a/b")
    pair: tuple[int, str] = (1, "a")
    numbers: Sequence[int] = ()
    sizes: Mapping[str, Sequence[float]] | None = None
    inner: Nested | None = None


FULL = Nested(0.5, {"a": (1, 2)}, "x", pair=(2, "b"), numbers=(3,), sizes={"b": (1.5,)})


@pytest.mark.parametrize(
    "value",
    [
        Nested(1.0, {}),
        FULL,
        Nested(0.1, {}, inner=FULL),
        Nested(1.0, {}, numbers=range(5, 2**62)),
    ],
    ids=["defaults", "full", "nested", "a range longer than memory"],
)
def test_every_kind_of_field_comes_back_from_json(value):
    assert typed(json.loads(json.dumps(plain(value))), Nested, "n") == value


def test_an_integer_passes_for_a_float():
    assert typed({"scale": 1, "names": {}}, Nested, "n").scale == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"names": {"a": ["1"]}}, r"^n\.names\.a\[0\]: must be an integer, got '1'$"),
    ({"note": 3}, r"^n\.note: must be a string, got 3; put it in quotes$"),
    ({"color": "blue"}, r"^n\.color: must be one of red, got 'blue'$"),
    ({"path": 1}, r"^n\.path: must be a path, got 1$"),
    ({"pair": [1]}, r"^n\.pair: must be a list of 2 values, got \[1\]$"),
    ({"pair": [1, 2]}, r"^n\.pair\[1\]: must be a string, got 2; put it in quotes$"),
    ({"numbers": "12"}, r"^n\.numbers: must be a list, got '12'$"),
    ({"numbers": {"start": 0, "stop": "9"}}, r"^n\.numbers\.stop: must be an integer, got '9'$"),
    ({"inner": {"scale": 1}}, r"^n\.inner: the key 'names' is missing$"),
    ({"note": [1]}, r"^n\.note: must be a string, got \[1\]$"),
    ({"inner": None, "color": None}, r"^n\.color: must be one of red, got null$"),
    ({"surprise": 1}, r"^n\.surprise: unknown key; known are scale, names, note, color, path, "),
    ({"size": 1}, r"^n\.size: unknown key; did you mean sizes\?$"),
])  # fmt: skip
def test_what_is_of_another_kind_is_refused_by_name(change, message):
    with pytest.raises(MoeConfigError, match=message):
        typed({"scale": 1.0, "names": {}} | change, Nested, "n")


def test_all_mistakes_are_named_at_once():
    wrong = {"names": {"a": [1, "2"], "b": 3}, "size": 1, "pair": [1, 2], "inner": {"names": {}}}
    with pytest.raises(MoeConfigError, match=r"^6 problems:\n") as error:
        typed(wrong, Nested, "n")
    assert [str(problem) for problem in error.value.problems] == [
        "n: the key 'scale' is missing",
        "n.size: unknown key; did you mean sizes?",
        "n.names.a[1]: must be an integer, got '2'",
        "n.names.b: must be a list, got 3",
        "n.pair[1]: must be a string, got 2; put it in quotes",
        "n.inner: the key 'scale' is missing",
    ]


def read_half(value):
    if value == "all":
        raise MoeConfigError("cannot be halved")
    return value / 2 if isinstance(value, int) else value


@dataclass(frozen=True)
class Halved:
    number: Annotated[float, read_half] | None = None


def test_what_a_field_reads_by_itself():
    assert typed({"number": 3}, Halved, "h") == Halved(1.5)
    assert typed({"number": None}, Halved, "h") == Halved()
    with pytest.raises(MoeConfigError, match=r"^h\.number: cannot be halved$"):
        typed({"number": "all"}, Halved, "h")
    with pytest.raises(MoeConfigError, match=r"^h\.number: must be a number, got 'x'$"):
        typed({"number": "x"}, Halved, "h")
