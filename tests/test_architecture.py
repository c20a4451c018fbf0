"""The rooms of docs/architecture.md: every file stands in one, and imports go down."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moe_fast

SOURCE = Path(moe_fast.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"

if not PAGE.is_file():
    pytest.skip("the project's pages do not lie beside the tests", allow_module_level=True)


def read_floors() -> list[list[str]]:
    """The rooms and files of each floor of the page's map, from the ground up."""
    section = PAGE.read_text(encoding="utf-8").partition("## The rooms")[2]
    lines = section.split("```")[1].strip().splitlines()[1:]
    return [line.partition("  ")[0].replace("/", "").split() for line in reversed(lines)]


def find_modules() -> dict[str, Path]:
    """Every module by its name in the package, the package's own roof left out."""
    # A wheel carries the examples: scripts that use the package, no part of it.
    scripts = SOURCE / "examples"
    files = (
        file
        for file in SOURCE.rglob("*.py")
        if file.parent != scripts and (file.parent != SOURCE or file.stem[0] != "_")
    )
    found = {}
    for file in files:
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = find_modules()


def read_imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever it does, types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports by dots"
            names = {f"{node.module}.{name.name}" for name in node.names}
            inner = {n for n in names if n.removeprefix("moe_fast.") in MODULES}
            found |= inner
            if len(inner) < len(names):
                found.add(str(node.module))
    return {name.removeprefix("moe_fast.") for name in found if name.startswith("moe_fast.")}


def test_every_file_stands_in_a_room():
    rooms = [room for floor in read_floors() for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {name.partition(".")[0] for name in MODULES} == {r.removesuffix(".py") for r in rooms}
    for room in rooms:
        assert (SOURCE / room).exists(), room


def test_every_file_is_named_in_its_room():
    """Those of one maker's models apart, which the page counts as one."""
    section = PAGE.read_text(encoding="utf-8").partition("Inside the rooms")[2]
    rooms = re.findall(r"^- \*\*`(\w+)/`\*\*(.*(?:\n  .*)*)", section, re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+)\.py`", text)) for room, text in rooms}
    for name, file in MODULES.items():
        room, _, stem = name.partition(".")
        makers = re.compile("^(DENSE|MOE|EXPERTS) ?[:=]", re.MULTILINE)
        if room == "families" and makers.search(file.read_text(encoding="utf-8")):
            continue
        assert not stem or stem.startswith("_") or stem in named[room], f"{name} is not named"
    absent = {f"{room}.{stem}" for room, stems in named.items() for stem in stems} - set(MODULES)
    assert not absent


def test_imports_go_down_the_floors():
    floor_of = {
        room.removesuffix(".py"): number
        for number, floor in enumerate(read_floors())
        for room in floor
    }
    crossings = 0
    for name, file in MODULES.items():
        here = name.partition(".")[0]
        for other in read_imports(file):
            there = other.partition(".")[0]
            if there != here:
                assert floor_of[there] < floor_of[here], f"{name} imports {other} from above"
                crossings += 1
    assert crossings > 200


def test_no_circle_of_imports():
    graph = {
        name: {other for other in read_imports(file) if other in MODULES and other != name}
        for name, file in MODULES.items()
    }
    # A file of a room may ask for the room itself, to find its other files by name.
    graph = {
        name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_nothing_private_is_used_by_another_module():
    """Names with an underscore stay in the class, or the file, that they are made in."""
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        stored = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        stored |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        stored |= {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in ast.walk(node)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
        }
        stored |= {"_asdict", "_replace", "_fields"}  # public in named tuples
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                assert node.attr in stored, f"{name} uses {node.attr} of another module"
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("moe_fast"):
                if str(node.module) == f"moe_fast.{name.partition('.')[0]}":
                    continue  # a room's own files, such as a level's kernels
                for alias in node.names:
                    private = alias.name.startswith("_") and not alias.name.startswith("__")
                    assert not private, f"{name} imports {alias.name}"


def test_every_promise_names_a_test_that_exists():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text))
    assert len(named) > 8
    for file, function in named:
        source = (PAGE.parents[1] / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in source, f"{file} has no {function}"


def test_every_addition_names_a_place_that_exists():
    table = PAGE.read_text(encoding="utf-8").partition("## Where an addition goes")[2]
    places = re.findall(r"`((?:src/moe_fast/)?[\w/]+(?:\.py|/))`", table.partition("\n## ")[0])
    assert len(places) > 12
    for place in places:
        root = SOURCE if (SOURCE / place).exists() else PAGE.parents[1]
        assert (root / place).exists(), place
