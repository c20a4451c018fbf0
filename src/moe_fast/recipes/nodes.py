"""YAML files as nodes that know their lines, read strictly.

A file is composed, never constructed: no tag in it can make an object, and what aliases stand for
is counted before anyone follows them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moe_fast.errors import Problem, RecipeError

LARGEST_FILE = 1_000_000  # bytes
DEEPEST_NESTING = 16
MOST_NODES = 200_000  # with what aliases stand for
KINDS = {
    "tag:yaml.org,2002:str": "a string",
    "tag:yaml.org,2002:int": "an integer",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "a truth value",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
    "tag:yaml.org,2002:seq": "a list",
    "tag:yaml.org,2002:map": "a mapping",
    "tag:yaml.org,2002:merge": "a merge key",
    "tag:yaml.org,2002:value": "a string",
}


class Node(Protocol):
    """A node as PyYAML composes it."""

    id: str  # "scalar", "sequence" or "mapping"
    tag: str
    value: Any
    start_mark: Any


class Entry(NamedTuple):
    """A value, its node, and where it stands, as in `experts[0].noise_scale`."""

    where: str
    node: Node
    value: Any


class Wrong(Exception):
    """A node that does not hold what belongs there."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


Entries = dict[str, Entry]
Read = Callable[[Node, str], Any]


"""Gives the value of a node that stands somewhere, or raises `Wrong`."""


def compose(path: Path) -> Node:
    """The document of a YAML file.

    Raises
    ------
    RecipeError
        A file that is missing, empty, too large, too deep, not UTF-8 or not YAML.
    ModuleNotFoundError
        Without PyYAML.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "recipes need PyYAML: pip install 'moe-fast[recipes]'", name="yaml"
        ) from None

    class Composer(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > DEEPEST_NESTING:
                line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
                deep = f"nested deeper than {DEEPEST_NESTING} levels"
                raise RecipeError(Problem(deep, file=path, line=line))
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    if not path.is_file():
        raise RecipeError("is no file", file=path)
    with path.open("rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise RecipeError(
            f"is longer than {LARGEST_FILE} bytes; a recipe is a short text", file=path
        )
    try:
        found: Any = Composer(data.decode("utf-8-sig")).get_single_node()
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8: {error}", file=path) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(Problem(f"is not YAML: {reason}", file=path, line=line)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {error}", file=path) from None
    if found is None or is_nothing(found):
        raise RecipeError("is empty", file=path)
    node: Node = found
    if number_of_nodes(node, {}) > MOST_NODES:
        raise RecipeError(
            f"its aliases stand for more than {MOST_NODES} values, or for what holds them",
            file=path,
        )
    return node


def number_of_nodes(node: Node, counted: dict[int, int]) -> int:
    """How many nodes there are once every alias is followed."""
    if id(node) not in counted:
        counted[id(node)] = MOST_NODES + 1  # for an alias, in it, of the node itself
        inner = node.value if node.id != "scalar" else []
        children = [child for item in inner for child in (item if node.id == "mapping" else [item])]
        counted[id(node)] = 1 + sum(number_of_nodes(child, counted) for child in children)
    return counted[id(node)]


class Reader:
    """Reads the nodes of one file and collects its problems, each with its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []

    def at(self, entry: Entry, text: str) -> Problem:
        where = f"{entry.where}: " if entry.where else ""
        return Problem(where + text, file=self.path, line=entry.node.start_mark.line + 1)

    def problem(self, entry: Entry, text: str) -> None:
        self.problems.append(self.at(entry, text))

    def read(self, read: Read, node: Node, where: str) -> Iterator[Entry]:
        """The entry of a node, or a problem and nothing."""
        try:
            yield Entry(where, node, read(node, where))
        except Wrong as error:
            self.problem(Entry(where, error.node, None), str(error))

    def mapping(
        self, reads: Mapping[str, Read], required: Sequence[str], node: Node, where: str
    ) -> Entries:
        """The entries of a mapping by key, without those that hold nothing."""
        entries: Entries = {}
        lines: dict[str, int] = {}
        given: set[str] = set()
        for key_node, value_node in pairs(node):
            key = text(key_node, where)
            inside = f"{where}.{key}" if where else key
            if key in lines:
                twice = f"stands twice, first in line {lines[key]}"
                self.problem(Entry(inside, key_node, None), twice)
            elif key not in reads:
                self.problem(Entry(inside, key_node, None), self.unknown(key, reads))
            elif not is_nothing(value_node):
                given.add(key)
                for entry in self.read(reads[key], value_node, inside):
                    entries[key] = entry
            lines.setdefault(key, key_node.start_mark.line + 1)
        for key in required:
            if key not in given:
                self.problem(Entry(where, node, None), f"{key} is missing")
        return entries

    def unknown(self, key: str, known: Collection[str]) -> str:
        """What to say of a key that is none of the known."""
        close = difflib.get_close_matches(key, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        return f"unknown key; {advice}"

    def listed(
        self, read: Read, node: Node, where: str, *, may_be_empty: bool = False
    ) -> list[Entry]:
        """The entries of a list."""
        if node.id != "sequence" or not (node.value or may_be_empty):
            wanted = "a list" if may_be_empty else "a list with something in it"
            raise Wrong(node, f"must be {wanted}, got {shown(node)}")
        return [
            entry
            for i, item in enumerate(node.value)
            for entry in self.read(read, item, f"{where}[{i}]")
        ]


def plain(value: Any) -> Any:
    """What entries hold, without their nodes; lists as tuples."""
    if isinstance(value, Entry):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return tuple(plain(entry) for entry in value) if isinstance(value, list) else value


def pairs(node: Node) -> Iterator[tuple[Node, Node]]:
    """The keys and values of a mapping; those that `<<` merges in come after its own."""
    if node.id != "mapping" or kind(node) != "a mapping":
        raise Wrong(node, f"must be a mapping of keys to values, got {shown(node)}")
    own = [(key, value) for key, value in node.value if kind(key) != "a merge key"]
    yield from own
    names = {key.value for key, _ in own if key.id == "scalar"}
    for key, value in node.value:
        if kind(key) == "a merge key":
            for merged in value.value if value.id == "sequence" else [value]:
                for inner_key, inner_value in pairs(merged):
                    if inner_key.value not in names:
                        names.add(inner_key.value)
                        yield inner_key, inner_value


def is_nothing(node: Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def kind(node: Node) -> str:
    if node.tag not in KINDS:
        raise Wrong(
            node,
            f"has the tag {node.tag!r}; a recipe holds plain strings, numbers, lists and mappings",
        )
    return KINDS[node.tag]


def shown(node: Node) -> str:
    """A node as an error names it."""
    if node.id == "scalar" and not is_nothing(node):
        return f"{node.value[:60]!r}, {kind(node)}"
    return kind(node)


def text(node: Node, where: str) -> str:
    if node.id == "scalar" and kind(node) == "a string":
        return str(node.value)
    quote = "; put it in quotes" if node.id == "scalar" and not is_nothing(node) else ""
    raise Wrong(node, f"must be a string, got {shown(node)}{quote}")


def integer(node: Node, where: str) -> int:
    if kind(node) == "an integer" and node.value.isdecimal() and len(node.value) < 19:
        return int(node.value)
    raise Wrong(node, f"must be an integer of at least 0, got {shown(node)}")


def number(node: Node, where: str) -> float:
    # YAML 1.1 takes 1e-3, without a point, for a string.
    try:
        value = float(node.value) if node.id == "scalar" else math.nan
    except ValueError:
        value = math.nan
    if kind(node) not in ("an integer", "a number", "a string") or not math.isfinite(value):
        raise Wrong(node, f"must be a finite number, got {shown(node)}")
    return value


def member(choices: type[StrEnum], node: Node, where: str) -> StrEnum:
    if kind(node) == "a string" and node.value in list(choices):
        return choices(node.value)
    raise Wrong(node, f"must be one of {', '.join(choices)}, got {shown(node)}")


def chosen(choices: Sequence[str], node: Node, where: str) -> str:
    if kind(node) == "a string" and node.value in choices:
        return str(node.value)
    raise Wrong(node, f"must be one of {', '.join(choices)}, got {shown(node)}")
