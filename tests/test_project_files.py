"""The files around the code say what the code says."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS = {
    "markdown": {"value"},
    "textarea": {"label"},
    "input": {"label"},
    "dropdown": {"label", "options"},
    "checkboxes": {"label", "options"},
}
OPTIONAL = {"description", "placeholder", "value", "render", "multiple", "default"}

if not FORMS:
    pytest.skip("the project's files do not lie beside the tests", allow_module_level=True)


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]


@pytest.mark.parametrize("form", [f for f in FORMS if f.name != "config.yml"], ids=lambda f: f.name)
def test_issue_forms_are_what_the_forge_takes(form):
    content = read(form)
    assert set(content) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert {"name", "description", "body"} <= set(content)
    ids = [field["id"] for field in content["body"] if "id" in field]
    assert len(ids) == len(set(ids))
    labels = [field["attributes"].get("label") for field in content["body"]]
    assert len(labels) == len(set(labels))
    assert any(field["type"] != "markdown" for field in content["body"])
    for field in content["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        required = FIELDS[field["type"]]
        assert required <= set(field["attributes"]) <= required | OPTIONAL
        assert set(field.get("validations", ())) <= {"required"}


def test_only_forms_and_their_configuration_lie_there():
    assert {f.name for f in FORMS} >= {"config.yml"}
    assert set(read(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")) <= {
        "blank_issues_enabled",
        "contact_links",
    }


def test_the_map_of_the_kernels_names_every_file():
    kernels = ROOT / "src" / "moe_fast" / "kernels"
    text = (kernels / "README.md").read_text(encoding="utf-8")
    files = [file for end in ("pxi", "h") for file in kernels.rglob(f"*.{end}")]
    assert len(files) > 20
    assert not [file.name for file in files if file.name not in text]


def test_the_sdist_holds_all_of_these_folders():
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    taken = {
        folder: patterns
        for command, folder, *patterns in map(str.split, lines)
        if command == "recursive-include"
    }
    single = [line.split()[1] for line in lines if line.startswith("include ")]
    for folder in ("tests", "docs", "examples"):
        for file in (ROOT / folder).rglob("*"):
            made = {part for part in file.parts if part.startswith((".", "__pycache__"))}
            if file.is_file() and not made and str(file.relative_to(ROOT)) not in single:
                assert any(fnmatch(file.name, pattern) for pattern in taken[folder]), file
