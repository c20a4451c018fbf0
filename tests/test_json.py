"""What `--json` prints, and the keys that docs/json.md promises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for extra in ("ml_dtypes", "typer", "rich"):
    pytest.importorskip(extra)

import numpy as np

from command import run
from moe_fast import (
    BuildReport,
    CheckReport,
    CompareReport,
    ConvertReport,
    Diagnosis,
    ModelReport,
    MoeConfigError,
    MoeReport,
    OperationReport,
    RoutingStats,
)

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
COMMANDS = {
    "build": "build demo/dense-a demo/dense-b -o moe --json",
    "check": "check demo/moe --json",
    "convert": "convert demo/moe -o converted --json",
    "prune": "prune demo/moe -o pruned --keep keep.json --json",
    "compare": "compare demo/moe pruned --json",
    "inspect": "inspect demo/moe --json",
    "plan": "plan 2 3 --json",
    "route": "route logits.npy --json",
    "doctor": "doctor --json",
    "families": "families --json",
    "demo": "demo demo --overwrite --json",
}
Key = tuple[str, ...]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each command prints."""
    folder = tmp_path_factory.mktemp("json")
    np.save(folder / "logits.npy", np.random.default_rng(0).standard_normal((2, 50, 8)))
    (folder / "keep.json").write_text("[0, 1, 2]")
    documents = {}
    for name in ("demo", *COMMANDS):
        done = run(*COMMANDS[name].split(), cwd=folder)
        assert done.returncode == (name == "compare"), done.stderr
        documents[name] = json.loads(done.stdout)
    return documents


def documented() -> dict[str, list[Key]]:
    """The keys of each command in the tables of the page."""
    keys: dict[str, list[Key]] = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
        keys[section.partition("\n")[0]] = [tuple(row.split(".")) for row in rows]
    (version, *parts) = keys["demo"]
    assert parts == [("build", "*"), ("check", "*")]
    within = [(name, *key) for name, _ in parts for key in keys[name] if key != ("version",)]
    return keys | {"demo": [version, *within]}


def keys_of(value: Any, within: Key = ()) -> Iterator[Key]:
    """The keys of a document; in a list of objects, those of each."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from keys_of(item, (*within, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from keys_of(item, (*within[:-1], f"{within[-1]}[]"))
    else:
        yield within


def fits(key: Key, pattern: Key) -> bool:
    """Whether a documented key stands for a printed one; names in capitals stand for any."""
    return len(key) == len(pattern) and all(
        part == wanted or wanted.isupper() for part, wanted in zip(key, pattern, strict=True)
    )


def test_every_command_with_json_is_documented():
    assert documented().keys() == {*COMMANDS, "score"}  # which tests/real/test_scores.py runs
    for name in (*COMMANDS, "expand", "merge", "extract", "reroute", "report", "gates"):
        listed = name in COMMANDS or name in ("expand", "merge", "extract", "reroute")
        assert ("--json" in run(name, "--help").stdout) == listed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documented_keys_are_those_that_are_printed(printed, name):
    found = list(dict.fromkeys(keys_of(printed[name])))
    patterns = documented()[name]
    assert [key for key in found if not any(fits(key, pattern) for pattern in patterns)] == []
    assert [each for each in patterns if not any(fits(key, each) for key in found)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_document_begins_with_the_version_of_its_keys(printed, name):
    assert next(iter(printed[name].items())) == ("version", 1)


@pytest.mark.parametrize(("name", "kind"), [
    ("build", BuildReport),
    ("check", CheckReport),
    ("convert", ConvertReport),
    ("prune", OperationReport),
    ("compare", CompareReport),
    ("inspect", ModelReport),
    ("doctor", Diagnosis),
])  # fmt: skip
def test_python_reads_a_document_back(printed, name, kind):
    report = kind.from_dict(printed[name])
    assert json.loads(report.to_json()) == printed[name]
    assert kind.from_dict(report.to_dict()) == report
    with pytest.raises(MoeConfigError, match=r"^version 2 of the keys is not known here, only 1$"):
        kind.from_dict(printed[name] | {"version": 2})


def test_python_reads_parts_of_a_document_back(printed):
    assert MoeReport.from_dict(printed["plan"]["report"]).num_layers == 3
    assert BuildReport.from_dict(printed["demo"]["build"]).num_experts == 8
    assert RoutingStats.from_dict(printed["route"]).summary() == printed["route"]["layers"]
