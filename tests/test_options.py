"""What the command says of its options, in messages, in its help and to the Tab key."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "rich", "yaml"):
    pytest.importorskip(extra)

import numpy as np
import typer
from typer.testing import CliRunner

from command import run
from moe_fast.command.cli import app
from moe_fast.command.options import CALLED, in_options
from moe_fast.demo import make_dense_model
from moe_fast.families.registry import moe_families

PARAMETERS = [
    SimpleNamespace(name=name, opts=[option])
    for name, option in {
        "models": "models",
        "experts": "--experts",
        "experts_per_token": "--experts-per-token",
        "dense_layers": "--dense-layers",
        "target": "--target",
        "threads": "--threads",
    }.items()
]


@pytest.mark.parametrize(("text", "expected"), [
    ("num_experts_per_tok (2) must not exceed num_experts (1)",
     "--experts-per-token (2) must not exceed --experts (1)"),
    ("num_experts=99: more than 9", "--experts=99: more than 9"),
    ("threads must be at least 1", "--threads must be at least 1"),
    ("num_models must be at least 1", "MODELS must be at least 1"),
    ("2 problems:\n  - dense_layers: none\n  - x", "2 problems:\n  - --dense-layers: none\n  - x"),
    ("target 'x' is not known", "--target 'x' is not known"),
    ("all threads write experts", "all threads write experts"),
    ("threads: is not a folder", "threads: is not a folder"),
    ("num_layers must be at least 1", "num_layers must be at least 1"),
    ("/tmp/dense_layers: is no folder", "/tmp/dense_layers: is no folder"),
    ("./dense_layers/config.json: is broken", "./dense_layers/config.json: is broken"),
    ("'dense_layers' is no folder here", "'dense_layers' is no folder here"),
])  # fmt: skip
def test_arguments_are_called_as_the_command_calls_them(text, expected):
    assert in_options(text, PARAMETERS) == expected


def test_what_a_recipe_says_keeps_its_name():
    text = "dense_layers: no layer 7; num_experts (1)"
    kept = in_options(text, PARAMETERS, ["dense_layers"])
    assert kept == "dense_layers: no layer 7; --experts (1)"


def test_every_name_is_that_of_some_command():
    commands = typer.main.get_command(app).commands.values()
    assert set(CALLED.values()) <= {each.name for command in commands for each in command.params}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    make_dense_model(folder / "dense", seed=0)
    np.save(folder / "logits.npy", np.zeros((4, 8), np.float32))
    models = f"models: [{folder.as_posix()}/dense]"
    (folder / "recipe.yml").write_text(f"{models}\ndense_layers: [7]\n")
    return folder


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ("build dense -o out --experts 1", 1, "--experts-per-token (2) must not exceed --experts (1)"),
    ("build dense -o out --dense-layers 7", 1, "--dense-layers: there is no layer 7"),
    ("build dense -o out --dense-layers 3-1", 2, "--dense-layers: '3-1' names no layers"),
    ("build dense -o out --max-shard-size 0", 1, "--max-shard-size must be at least 1, got 0"),
    ("build dense -o out --threads 0", 1, "--threads must be at least 1, got 0"),
    ("build dense -o out --target x", 1, "error: --target 'x' is not known; known are auto,"),
    ("build recipe.yml -o out", 1, "error: dense_layers: there is no layer 7"),
    ("plan 0 2", 1, "error: MODELS must be at least 1, got 0"),
    ("plan 2 2 --hidden-size -1", 1, "error: --hidden-size must be at least 0, got -1"),
    ("route logits.npy --groups 3", 1, "error: --groups must divide"),
    ("route logits.npy --capacity-factors a", 2, "--capacity-factors: 'a' are no numbers"),
    ("route logits.npy --plot picture", 1, "picture: has no ending that says the format"),
    ("gates 64 8 -o out.npy --dtype int8", 1, "error: --dtype must be one of float64"),
    ("check dense --text letter.txt", 1, "letter.txt: there is no such file"),
    ("inspect .", 1, "has no config.json; its folders with models are dense"),
])  # fmt: skip
def test_what_a_wrong_value_is_told(folder, monkeypatch, arguments, code, message):
    monkeypatch.chdir(folder)
    done = run(*arguments.split())
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert not (folder / "out").exists()


def test_a_file_makes_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert run("gates", 64, 8, "-o", "new/a/gates.npy").returncode == 0
    assert np.load("new/a/gates.npy").shape == (1, 8, 64)
    done = run("gates", 64, 8, "-o", "new/a/gates.npy")
    assert "exists already; choose another file, or replace it: --overwrite" in done.stderr
    assert run("report", "dense", "-o", "new/b/report.html").stdout.strip() == "new/b/report.html"
    assert (folder / "new" / "b" / "report.html").is_file()


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_the_help_of_a_command_fits_in_eighty_columns(name):
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout  # where rich cuts an option or a word


@pytest.mark.parametrize(("words", "values"), [
    ("build --target ", ["auto", *moe_families()]),
    ("build --target f", ["flex_olmo"]),
    ("build --router-init b", ["balanced"]),
    ("gates --dtype b", ["bfloat16"]),
    ("route --scores ", ["softmax", "sigmoid"]),
    ("route --drop-policy ", ["position", "probs"]),
])  # fmt: skip
def test_the_tab_key_completes_values(words, values):
    line = f"moe-fast {words}"
    environment = {
        "_MOE_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    done = CliRunner().invoke(app, prog_name="moe-fast", env=environment)
    assert done.stdout.split() == values


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("arguments", ["plan 2 2", "plan 2 2 --json", "--help"])
def test_results_that_no_file_takes(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moe_fast", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == f"error: standard output: {os.strerror(errno.ENOSPC)}\n"
