"""Every kind of field becomes plain values, and comes back from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

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
    ({"names": {"a": ["1"]}}, r"^n\.names\.a\[0\]: '1' is not int$"),
    ({"note": 3}, r"^n\.note: 3 is not str$"),
    ({"color": "blue"}, r"^n\.color: 'blue' is none of red$"),
    ({"path": 1}, r"^n\.path: 1 is not Path$"),
    ({"pair": [1]}, r"^n\.pair: \[1\] is not tuple\[int, str\]$"),
    ({"pair": [1, 2]}, r"^n\.pair\[1\]: 2 is not str$"),
    ({"numbers": "12"}, r"^n\.numbers: '12' is not .*Sequence\[int\]$"),
    ({"numbers": {"start": 0, "stop": "9"}}, r"^n\.numbers\.stop: '9' is not int$"),
    ({"inner": {"scale": 1}}, r"^n\.inner: the key 'names' is missing$"),
    ({"size": 1}, r"^n: unknown key 'size'; known are scale, names, note, "),
])  # fmt: skip
def test_what_is_of_another_kind_is_refused_by_name(change, message):
    with pytest.raises(MoeConfigError, match=message):
        typed({"scale": 1.0, "names": {}} | change, Nested, "n")
