"""The package's dataclasses beside those of the standard library: everything is the same."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import field

import pytest

from moe_fast.records import dataclass

BOTH = pytest.mark.parametrize("make", [dataclasses.dataclass, dataclass], ids=["standard", "own"])


def classes(make):
    """A class with everything, one derived from it, and one with slots."""

    @make(frozen=True)
    class First:
        """Documented."""

        a: int
        b: str = "b"
        c: list[int] = field(default_factory=list)
        d: int = field(default=4, repr=False)
        e: int = field(default=5, compare=False)
        f: int = field(init=False, default=6)

        def __post_init__(self) -> None:
            object.__setattr__(self, "f", self.a + 1)

    @make(frozen=True)
    class Second(First):
        """Documented, too."""

        g: int = field(kw_only=True)
        h: tuple[int, ...] = ()

    @make(frozen=True, slots=True)
    class Slots:
        """Documented as well."""

        x: int
        y: float = 0.5

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Slots) and self.x == other.x

        __hash__ = None  # type: ignore[assignment]

    return First, Second, Slots


@BOTH
def test_what_they_do(make):
    First, Second, Slots = classes(make)
    first = First(1, c=[2])
    assert (first.a, first.b, first.c, first.d, first.e, first.f) == (1, "b", [2], 4, 5, 2)
    assert First(1).c is not First(1).c
    assert repr(first).endswith("First(a=1, b='b', c=[2], e=5, f=2)")
    assert first == First(1, "b", [2], 4, 99)
    assert first != First(1, "b", [2], 5)
    assert first.__eq__(3) is NotImplemented
    assert first != Second(1, "b", [2], g=1)
    assert dataclasses.asdict(first) == {"a": 1, "b": "b", "c": [2], "d": 4, "e": 5, "f": 2}
    changed = dataclasses.replace(first, a=3)
    assert (changed.a, changed.f) == (3, 4)
    second = Second(1, g=7, h=(1,))
    assert (second.g, second.h, second.f) == (7, (1,), 2)
    assert Second(1, "b", [], 4, 5, (2,), g=3).h == (2,)
    for wrong in (lambda: First(), lambda: First(1, z=2), lambda: Second(1)):
        with pytest.raises(TypeError, match="__init__"):
            wrong()
    with pytest.raises(TypeError, match="unhashable type: 'list'"):
        hash(first)
    assert Slots(1) == Slots(1, 0.7)
    assert not hasattr(Slots(1), "__dict__")
    assert dataclasses.is_dataclass(First)
    assert First.__match_args__ == ("a", "b", "c", "d", "e")


@BOTH
def test_they_are_frozen(make):
    First, _, Slots = classes(make)
    for made in (First(1), Slots(1)):
        name = dataclasses.fields(made)[0].name
        with pytest.raises(
            dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}"
        ):
            setattr(made, name, 2)
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"delete field '{name}"):
            delattr(made, name)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError), match=r"new|super"):
        Slots(1).new = 2


def test_the_signatures_are_the_same():
    for own, standard in zip(classes(dataclass), classes(dataclasses.dataclass), strict=True):
        ours, theirs = (inspect.signature(each) for each in (own, standard))
        assert list(ours.parameters) == list(theirs.parameters)
        for mine, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
            assert (mine.kind, mine.annotation) == (other.kind, other.annotation)
            assert (mine.default is mine.empty) == (other.default is other.empty)
        assert own.__doc__ == standard.__doc__


@dataclass(frozen=True)
class Plain:
    """With room for attributes that are computed once."""

    x: int
    y: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Slotted:
    """Without."""

    x: int
    y: tuple[int, ...] = ()


@pytest.mark.parametrize("kind", [Plain, Slotted])
def test_they_travel(kind):
    """To the processes that write a build's files."""
    made = kind(1, (2, 3))
    for other in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert (type(other), other) == (kind, made)
        assert hash(other) == hash(made)


def test_others_are_the_standard_librarys():
    @dataclass
    class Changing:
        x: int = 0

    changing = Changing()
    changing.x = 3
    assert changing == Changing(3)
