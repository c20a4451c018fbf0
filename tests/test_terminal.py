"""What is printed on a terminal: words stay whole, tables fit the width."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

for extra in ("typer", "rich", "ml_dtypes"):
    pytest.importorskip(extra)

from command import run
from families import make_model

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    for seed in (0, 1):
        make_model(folder / f"dense-{seed}", "llama", seed=seed)
    done = run("build", "dense-0", "dense-1", "-o", "moe", "--experts", 64, cwd=folder)
    assert done.returncode == 0
    np.save(folder / "logits.npy", np.random.default_rng(0).normal(size=(3, 400, 64)))
    return folder


def on_terminal(width: int, *arguments: str, cwd: os.PathLike[str]) -> list[str]:
    """The lines that a terminal of this width shows, without colours."""
    environment = os.environ | {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-m", "moe_fast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert COLOURS.search(done.stdout)
    return COLOURS.sub("", done.stdout).splitlines()


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "moe"),
        ("inspect", "moe"),
        ("route", "logits.npy"),
        ("build", "dense-0", "dense-1", "-o", "new", "--dry-run"),
        ("plan", "2", "4"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_lines_fit_and_words_stay_whole(folder, width, arguments):
    lines = on_terminal(width, *arguments, cwd=folder)
    for line in lines:
        assert len(line) <= width or " " not in line.strip(), line
    words = {word for line in lines for word in line.split()}
    whole = run(*arguments, cwd=folder)
    missing = set(whole.stdout.split()) - words
    assert not {word for word in missing if not re.search(r"\d\.\d", word)}  # seconds differ


def test_a_dry_run_says_last_what_else_would_not_fit(folder):
    shown = run("build", "dense-0", "-o", "new", "--dry-run", cwd=folder).stdout
    _, _, rest = shown.partition("\nother targets, and why they do not fit\n")
    first, *_ = rest.splitlines()
    assert first.startswith("  qwen3_moe: config.json: model_type llama has no norm on queries")
    assert rest.endswith("\n\ndry run: nothing is written\n")


def test_columns_that_do_not_fit_stand_below(folder):
    lines = on_terminal(60, "route", "logits.npy", cwd=folder)
    headers = [line for line in lines if re.match("layer +[a-zA-Z]", line)]
    assert len(headers) >= 2
    on_one_line = run("route", "logits.npy", cwd=folder).stdout.splitlines()
    (wide,) = (line for line in on_one_line if re.match("layer +tokens", line))
    titles = [title for line in headers for title in re.split(r"\s{2,}", line.strip())]
    assert list(dict.fromkeys(titles)) == re.split(r"\s{2,}", wide.strip())


def test_a_second_line_stands_beside_the_first(folder):
    lines = on_terminal(60, "check", "moe", cwd=folder)
    (first,) = (n for n, line in enumerate(lines) if line.startswith("passed        routing"))
    start = lines[first].index("2 routers")
    assert lines[first + 1].startswith(" " * start)
    assert not lines[first + 1].startswith(" " * (start + 1))


def test_copies_are_named_in_ranges(folder):
    assert "  experts 0-63 in layers 0-1" not in run("inspect", "moe", cwd=folder).stdout
    done = run("build", "dense-0", "-o", "one", "--experts", 64, cwd=folder)
    assert done.returncode == 0
    assert "  experts 0-63 in layers 0-1\n" in run("inspect", "one", cwd=folder).stdout


def test_an_output_in_the_last_place(folder):
    done = run("build", "dense-0", "out", cwd=folder)
    assert done.returncode == 2
    assert "Missing option '--output' / '-o'. Did you mean -o out?" in done.stderr
    assert not (folder / "out").exists()
    done = run("build", "dense-0", "out", "--experts", "4", "--overwrite", cwd=folder)
    assert "Did you mean -o out?" in done.stderr
    assert "Did you mean" not in run("build", "dense-0", "--experts", "4", cwd=folder).stderr


def test_quiet_leaves_warnings_and_json(folder):
    done = run("build", "dense-0", "-o", "quiet", "--quiet", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loud = run("check", "quiet", "-q", "--json", cwd=folder)
    assert loud.stdout.startswith("{")


@pytest.mark.parametrize("arguments", [(), ("build",), ("route",)], ids=str)
def test_help_by_one_letter_shows_no_type_of_flags(folder, arguments):
    done = run(*arguments, "-h", cwd=folder)
    assert done.returncode == 0
    assert "<bool>" not in done.stdout
    assert done.stdout == run(*arguments, "--help", cwd=folder).stdout


def test_scores_are_whole_tokens_and_three_digits(capsys):
    from moe_fast.calibration.score import ScoreReport
    from moe_fast.command.console import show_scores

    layer = {"frequency": [1234, 56], "reap": [0.00123456, 0.5], "ean_mean": [2.0, 2.0]}
    show_scores(ScoreReport("moe", "scores.json", 645, 2, {"0": layer}, "", None, 0.1))
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", header.strip()) == [
        "layer",
        "tokens per expert",
        "reap",
        "mean norm",
    ]
    assert re.split(r"\s{2,}", line.strip()) == ["0", "56 to 1,234", "0.00123 to 0.5", "2"]


def test_the_use_of_models_is_even_or_a_number(folder):
    even = run("plan", "2", "4", cwd=folder).stdout
    assert re.search(
        "^use of models +even: every model gives the same number of experts$", even, re.M
    )
    uneven = run("plan", "3", "4", cwd=folder).stdout
    assert re.search("^use of models +uneven: cv 0.1768 of the number of experts per", uneven, re.M)


def test_a_bar_appears_with_the_first_bytes(monkeypatch):
    from rich.console import Console

    from moe_fast.command import console

    written = io.StringIO()
    terminal = SimpleNamespace(
        console=Console(file=written, force_terminal=True, width=80, _environ={"TERM": "xterm"}),
        is_terminal=True,
    )
    monkeypatch.setattr(console, "error_output", terminal)
    with console.progress_bar("writing") as progress:
        assert written.getvalue() == ""
        progress(1, 2)
    assert "writing" in written.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("gates", "--help"),
        ("gates", "--nothing"),
        ("nothing",),
        ("check", "moe"),
        ("build", "dense-0", "-o", "new", "--dry-run", "--routers", "uniform"),
        ("build", "nowhere", "-o", "new"),
    ],
    ids=" ".join,
)
def test_colours_can_be_read_on_white(folder, arguments):
    """Yellow, cyan and white cannot, as text in the colours that terminals name."""
    environment = os.environ | {"COLUMNS": "100", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-m", "moe_fast", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    codes = re.findall(r"\x1b\[([0-9;]+)m", done.stdout + done.stderr)
    assert codes
    assert not {n for code in codes for n in code.split(";")} & {"33", "36", "37", "93", "96", "97"}


def test_numbers_beside_a_bar_can_be_read_on_white():
    from moe_fast.command.terminal import Output

    console = Output("stderr").console
    for name in ("download", "data.speed", "remaining"):
        assert console.get_style(f"progress.{name}").color is None
