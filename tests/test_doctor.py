"""What the doctor says about an installation."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import numpy as np
import pytest

from command import run
from moe_fast import kernels
from moe_fast.command import doctor
from moe_fast.command.doctor import Package, diagnose
from moe_fast.kernels.level import levels_available


def test_it_tells_what_runs():
    diagnosis = diagnose()
    assert diagnosis.moe_fast == metadata.version("moe-fast")
    assert diagnosis.numpy == np.__version__
    assert diagnosis.level == kernels.level_in_use
    assert "{}.{}.{}".format(*sys.version_info) in diagnosis.python


def test_every_extra_says_what_it_is_for():
    pytest.importorskip("typer")
    extras = {extra.name: extra for extra in diagnose().extras}
    declared = set(metadata.metadata("moe-fast").get_all("Provides-Extra"))
    assert extras.keys() == declared - {"all"}
    assert all(extra.purpose for extra in extras.values())
    typer = next(p for p in extras["cli"].packages if p.name == "typer")
    assert typer.installed == metadata.version("typer")
    assert typer.fits
    assert extras["cli"].complete


def test_what_is_missing_or_old_is_told_with_its_command(monkeypatch):
    requirements = [
        'numpy>=99; extra == "numbers"',
        'absent-package; extra == "nothing"',
        "numpy>=1.26",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    numbers, nothing = doctor.find_extras()
    assert numbers.packages == (Package("numpy", "99", np.__version__),)
    assert nothing.packages == (Package("absent-package", None, None),)
    assert not numbers.complete
    assert not nothing.complete
    assert nothing.install_command == "pip install 'moe-fast[nothing]'"


@pytest.mark.parametrize(
    ("installed", "minimum", "fits"),
    [
        ("1.10", "1.9", True),
        ("1.9", "1.10", False),
        ("2.0rc1", "2", True),
        ("3", "2.5.1", True),
        (None, None, False),
        ("0.1", None, True),
    ],
)
def test_versions_compare_as_numbers(installed, minimum, fits):
    assert Package("p", minimum, installed).fits is fits


def test_a_forced_lower_level_is_told(monkeypatch):
    if len(levels_available()) == 1:
        pytest.skip("this processor has one level")
    monkeypatch.setattr(kernels, "level_in_use", "baseline")
    assert "MOE_FAST_LEVEL forces the lower one" in diagnose().problems[0]


def test_command():
    pytest.importorskip("typer")
    done = run("doctor")
    assert done.returncode == 0
    assert kernels.level_in_use in done.stdout
    done = run("doctor", "--json")
    assert json.loads(done.stdout) == {"version": 1, **diagnose().to_dict()}


def test_the_command_tells_its_version():
    pytest.importorskip("typer")
    done = run("--version")
    assert (done.returncode, done.stdout.split()) == (0, ["moe-fast", metadata.version("moe-fast")])
