"""The training script of the documentation: the loss falls, the experts stay balanced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_fast import inspect_model
from moe_fast.demo import make_dense_model

SCRIPT = Path(__file__).parents[2] / "examples" / "train_upcycled.py"


def run(*arguments: object) -> str:
    # One thread: the figures stay the same, and small matrices are no faster with more.
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out(printed: str) -> dict[str, float]:
    return {
        what: float(loss) for what, loss in re.findall(r"held-out loss, ([a-z ]+): (\S+)", printed)
    }


def cvs(printed: str) -> np.ndarray:
    return np.array([float(cv) for cv in re.findall(r"load cv (\S+)", printed)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "moe"
    return run("--output", output), output


def test_upcycling_keeps_the_loss_and_training_lowers_it(trained):
    losses = held_out(trained[0])
    assert losses["upcycled"] == pytest.approx(losses["dense model"], abs=2e-4)
    assert losses["trained"] < losses["upcycled"] - 0.03


def test_the_balancing_loss_balances(trained):
    without = cvs(run("--balance", "0"))[-30:].mean()
    balanced = cvs(trained[0])[-30:].mean()
    assert balanced < 0.3
    assert balanced < 0.7 * without


def test_the_experts_have_moved_apart(trained):
    report = inspect_model(trained[1])
    assert (report.num_experts, report.num_moe_layers) == (8, 2)
    assert report.copies == ()


def test_a_model_and_a_text_of_ones_own(tmp_path):
    make_dense_model(tmp_path / "dense", seed=3)
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    printed = run(
        tmp_path / "dense", "--text", text, "--steps", 5, "--experts", 4, "--batch-size", 2
    )
    assert "training the dense model" not in printed
    assert len(cvs(printed)) == 5
    assert held_out(printed)["trained"] < held_out(printed)["upcycled"]
