"""The training script of the documentation: the loss falls, the experts stay balanced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_fast import inspect_model
from moe_fast.demo import make_dense_model

SCRIPT = Path(__file__).parents[2] / "examples" / "train_upcycled.py"


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


def run(*arguments: object, launcher: Sequence[str] = ()) -> str:
    # One thread: the figures stay the same, and small matrices are no faster with more.
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, *map(str, arguments)],
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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_one_model(launcher, tmp_path):
    options = ["--steps", 20, "--batch-size", 4, "--output", tmp_path / "moe"]
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
        options.append("--accelerate")
    printed = run(*options, launcher=LAUNCHERS[launcher])
    losses = held_out(printed)
    assert losses["upcycled"] == pytest.approx(losses["dense model"], abs=2e-4)
    assert losses["trained"] < losses["upcycled"] - 0.01
    assert len(cvs(printed)) == 20
    assert cvs(printed)[-5:].mean() < 0.5
    report = inspect_model(tmp_path / "moe")
    assert (report.num_experts, report.num_moe_layers) == (8, 2)
    assert report.copies == ()


def test_fine_grained_experts_start_at_the_loss_of_the_dense_model():
    options = ["--granularity", 4, "--steps", 1, "--dense-steps", 20]
    printed = run(*options)
    losses = held_out(printed)
    assert losses["upcycled"] == pytest.approx(losses["dense model"], abs=2e-4)
    assert "multiple of granularity" not in printed
    printed = run(*options, "--experts-per-token", 2)
    assert "warning: num_experts_per_tok 2 is not a multiple of granularity 4" in printed


def test_a_recipe_and_a_start_for_its_routers(tmp_path):
    for seed in range(2):
        make_dense_model(tmp_path / f"dense{seed}", seed=seed)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"base_model: {tmp_path / 'dense0'}\ngate_mode: random\nexperts_per_token: 1\n"
        f"experts:\n- source_model: {tmp_path / 'dense0'}\n"
        f"- source_model: {tmp_path / 'dense1'}\n  noise_scale: 0.01\n"
    )
    output = tmp_path / "moe"
    printed = run("--recipe", recipe, "--steps", 3, "--batch-size", 2, "--output", output)
    assert len(cvs(printed)) == 3
    assert inspect_model(output).num_experts == 2
    alike = cvs(run(tmp_path / "dense0", "--routers", "uniform", "--steps", 1))
    spread = cvs(run(tmp_path / "dense0", "--routers", "normal", "--steps", 1))
    assert spread < alike == pytest.approx(np.sqrt(3), abs=1e-3)  # two of eight get every token
