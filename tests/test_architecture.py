"""The map in CONTRIBUTING.md names every file, and imports go down it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moe_fast

SOURCE = Path(moe_fast.__file__).parent
GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"

if not GUIDE.is_file():
    pytest.skip("the project's files do not lie beside the tests", allow_module_level=True)


def floors() -> dict[str, int]:
    """The line of the map on which each module stands."""
    section = GUIDE.read_text(encoding="utf-8").partition("## The map")[2]
    found: dict[str, int] = {}
    folder = ""
    for floor, line in enumerate(section.split("```")[1].strip().splitlines()):
        names = line.strip().partition("  ")[0].split(", ")
        if not line.startswith(" "):
            folder = names[0].replace("/", ".") if names[0].endswith("/") else ""
        for name in names:
            if name.endswith(".py"):
                found[folder + name.removesuffix(".py")] = floor
    return found


def modules() -> dict[str, Path]:
    """Every module by its name in the package; what is above the map, and folders, left out."""
    files = (file for file in SOURCE.rglob("*.py") if not file.name.startswith("__"))
    return {".".join(f.relative_to(SOURCE).with_suffix("").parts): f for f in files}


def imports(file: Path) -> set[str]:
    """What a module imports of the package, wherever it does, types alone excepted."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports by dots"
            found.add(str(node.module))
            found.update(f"{node.module}.{name.name}" for name in node.names)
        waiting += ast.iter_child_nodes(node)
    return {name.removeprefix("moe_fast.") for name in found if name.startswith("moe_fast.")}


def test_every_file_is_on_the_map():
    assert sorted(floors()) == sorted(modules())


def test_imports_go_down():
    floor = floors()
    crossings = 0
    for name, file in modules().items():
        for other in imports(file) & floor.keys():
            assert floor[name] <= floor[other], f"{name} stands below {other}, which it imports"
            crossings += floor[name] < floor[other]
    assert crossings > 100
