"""YAML files as plain values, with the line of each.

A file is composed and never constructed, so no tag in it can make an object. All values are
counted, with those that aliases stand for, so a short file cannot fill the memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_fast.errors import CheckpointError, Problem, RecipeError
from moe_fast.plain import Mistakes, join_place
from moe_fast.storage.files import open_regular

LARGEST_FILE = 1_000_000  # bytes
MOST_VALUES = 200_000
FIRST_KEYS = re.compile(
    rb"(?:^|\A\s*\{\s*\")(base_model|experts|models|merge_method|slices)\"?[ \t]*:",
    re.MULTILINE | re.ASCII,
)
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]{0,999})")
YAML = "tag:yaml.org,2002:"
Node = Any
"""A node as PyYAML composes it: `id` is "scalar", "sequence" or "mapping"."""


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe, by its ending or by the keys in it."""
    if path.suffix.lower() in (".yml", ".yaml"):
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return FIRST_KEYS.search(stream.read(LARGEST_FILE)) is not None
    except OSError:
        return False


class Unread(NamedTuple):
    """The words for a value that is not a string, a decimal number, a list or a mapping."""

    words: str

    def __repr__(self) -> str:
        return self.words


class Document:
    """A YAML file in plain values, with the line of each and what is wrong with the YAML itself.

    `value` has dicts with string keys, lists, strings, numbers, `None`, and `Unread` for the rest.

    Raises
    ------
    RecipeError
        A file that is missing, empty, too large, too deep, not UTF-8 or not YAML.
    ModuleNotFoundError
        Without PyYAML.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self.mistakes: list[tuple[int, str, str]] = []
        self.num_values = 0
        try:
            node = compose(file)
            self.value = self.read(node, "", get_line(node))
        except RecursionError:  # also for an alias in what it stands for
            raise RecipeError("is nested too deep", file=file) from None

    def locate(self, mistakes: Mistakes) -> list[Problem]:
        """These mistakes and those of the YAML itself as messages with file and line, in order."""
        located = list(self.mistakes)
        for where, text in mistakes:
            known = where
            if where not in self.lines:  # the file does not spell it out
                known = max(filter(where.startswith, self.lines), key=len)
            located.append((self.lines[known], known, text))
        located.sort(key=lambda mistake: mistake[0])
        return [
            Problem(f"{where}: {text}" if where else text, file=self.file, line=line)
            for line, where, text in located
        ]

    def read(self, node: Node, where: str, line: int) -> Any:
        """The plain value of a node that stands in this line."""
        self.count_value()
        self.lines[where] = line
        if node.id == "scalar":
            return read_scalar(node)
        if (node.id, node.tag) == ("sequence", f"{YAML}seq"):
            items = enumerate(node.value)
            return [self.read(item, f"{where}[{i}]", get_line(item)) for i, item in items]
        if (node.id, node.tag) == ("mapping", f"{YAML}map"):
            return self.read_mapping(node, where)
        return Unread(f"a {node.id} with the YAML type {node.tag.removeprefix(YAML)}")

    def read_mapping(self, node: Node, where: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        own = {id(key) for key, _ in node.value}
        for key, item in self.walk_pairs(node, where):
            name = read_scalar(key) if key.id == "scalar" else Unread(f"a {key.id}")
            line = get_line(key)
            if not isinstance(name, str):
                self.mistakes.append((line, where, f"a key must be a string, got {name!r}"))
                continue
            place = join_place(where, name)
            if name not in values:
                values[name] = self.read(item, place, line)
            elif id(key) in own:
                twice = f"stands twice, first in line {self.lines[place]}"
                self.mistakes.append((line, place, twice))
        return values

    def walk_pairs(self, node: Node, where: str) -> Iterator[tuple[Node, Node]]:
        """The keys and values of a mapping; those that `<<` merges in come after its own."""
        merged: list[Node] = []
        for key, value in node.value:
            self.count_value()
            if key.tag == f"{YAML}merge":
                merged += value.value if value.id == "sequence" else [value]
            else:
                yield key, value
        for mapping in merged:
            if mapping.id == "mapping":
                yield from self.walk_pairs(mapping, where)
            else:
                self.mistakes.append((get_line(mapping), where, "<< must name mappings"))

    def count_value(self) -> None:
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            raise RecipeError(
                f"its aliases stand for more than {MOST_VALUES} values", file=self.file
            )


def compose(file: Path) -> Node:
    """The root node of a YAML file."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "recipes need PyYAML: pip install 'moe-fast[recipes]'", name="yaml"
        ) from None
    try:
        with open_regular(file) as stream:
            data = stream.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise RecipeError(f"is longer than {LARGEST_FILE} bytes; recipes are short", file=file)
        node = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except CheckpointError as error:
        raise RecipeError(*error.problems) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8: {error}", file=file) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(Problem(f"is not YAML: {reason}", file=file, line=line)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {error}", file=file) from None
    if node is None or node.tag == f"{YAML}null":
        raise RecipeError("is empty", file=file)
    return node


def get_line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def read_scalar(node: Node) -> Any:
    """A string, a decimal number, a bool or `None`, or else what the scalar is in YAML."""
    kind, text = node.tag.removeprefix(YAML), node.value
    if kind in ("str", "value"):
        return text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):  # yes, no, on and off may be words
        return text.lower() == "true"
    if kind == "int" and DECIMAL.fullmatch(text):
        return int(text.replace("_", ""))
    if kind == "float":
        with contextlib.suppress(ValueError):  # .nan, .inf, 1:30.5
            return float(text)
    return Unread(f"{text[:60]!r}, which has the YAML type {kind}")
