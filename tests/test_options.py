"""What the command says of its options, in messages, in its help and to the Tab key."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "rich", "yaml"):
    pytest.importorskip(extra)

import numpy as np
import typer
from safetensors.numpy import load_file
from typer.testing import CliRunner

from command import run
from moe_fast import design_moe
from moe_fast.command import cli
from moe_fast.command.application import application_for, make_application
from moe_fast.command.declaration import COMMANDS, Argument
from moe_fast.command.options import CALLED, in_options, option_names
from moe_fast.command.parser import parse
from moe_fast.demo import make_dense_model
from moe_fast.errors import MoeConfigError, Problem
from moe_fast.families.registry import moe_families
from moe_fast.storage.hub import repository_name

app = make_application(COMMANDS.values())


def test_arguments_are_called_as_the_command_calls_them():
    command = typer.main.get_command(app).commands["build"]
    options = option_names(command.params, {"path": "output"})
    assert options["num_experts_per_tok"] == "--experts-per-token"
    assert options["dense_layers"] == "--dense-layers"
    assert (options["models"], options["path"]) == ("MODEL", "--output")
    for problem, expected in (
        (Problem("must be 1", argument="num_experts_per_tok"), "--experts-per-token must be 1"),
        (Problem("must be 1", argument="num_layers"), "num_layers must be 1"),
        (Problem("is empty", argument="target", file="target"), "target: target is empty"),
        (Problem("threads must be 1"), "threads must be 1"),
    ):
        assert in_options(problem, options) == expected


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
    ("build dense -o out --experts 1", 2,
     "error: --experts-per-token must be at most 1, the number of experts, got 2\n"),
    ("build dense -o out --dense-layers 7", 2, "error: --dense-layers lists layer 7; the base"),
    ("build dense -o out --dense-layers 3-1", 2, "--dense-layers must be a list of layers"),
    ("build dense -o out --max-shard-size 0", 2, "--max-shard-size must be at least 1 MB, got 0"),
    ("build dense -o out --max-shard-size 5", 2, "write '5GB' for gigabytes, or '5B' if you mean"),
    ("build dense -o out --threads 0", 2, "--threads must be at least 1, got 0"),
    ("build dense -o out --target x", 2, "error: --target must be one of 'auto', 'mixtral',"),
    ("build dense -o out --routers x", 2, "error: --routers must be one of 'auto', 'balanced'"),
    ("build dense -o out --layout fussed", 2,
     "error: --layout must be one of 'per-expert', 'fused', got 'fussed'; did you mean 'fused'?\n"),
    ("convert dense -o out --layout=x", 2, "one of 'per-expert', 'fused', got 'x'\n"),
    ("gates 64 8 -o out.npy --init balancd", 2, "got 'balancd'; did you mean 'balanced'?"),
    ("route logits.npy --method topk", 2, "error: --method must be one of 'top_k', 'switch_tra"),
    ("build dense -o out --experts eight", 2, "error: --experts must be an integer, got 'eight'\n"),
    ("prune dense -o out --experts=4.5", 2, "error: --experts must be an integer, got '4.5'\n"),
    ("build dense -o out --experts --json", 2, "error: --experts must be an integer, got '--js"),
    ("plan two 2", 2, "error: MODELS must be an integer, got 'two'\n"),
    ("build dense -o out --reinit half", 2, "error: --reinit must be a number, got 'half'\n"),
    ("compare dense dense --tolerance x", 2, "error: --tolerance must be a number, got 'x'\n"),
    ("build dense -o out --dtype int8", 2, "error: --dtype must be one of 'float32', 'bfloat16'"),
    ("build dense -o out --granularity 0", 2, "error: --granularity must be at least 1, got 0"),
    ("build dense -o out --granularity 3 --experts 8", 2,
     "error: --experts (8) must be a multiple of granularity (3)"),
    ("build dense -o out --granularity 3", 1, "intermediate_size 128 is not a multiple of gr"),
    ("build dense -o out --reinit 1.5", 2, "error: --reinit must be from 0 to 1, got 1.5"),
    ("build dense -o out --reinit-sets x", 2, "error: --reinit-sets must be one of 'shared', 's"),
    ("build dense -o out --backbone x", 2, "error: --backbone must be base, mean or numbers"),
    ("build dense -o out --backbone 1,2", 2, "error: --backbone must be 'base', 'mean' or a we"),
    ("build dense -o out --seed -1", 2, "error: --seed must be at least 0, got -1"),
    ("build recipe.yml -o out --granularity 2", 2, "--granularity is for models; write it into"),
    ("build recipe.yml -o out --shuffle", 2, "--shuffle is for models; write it into the"),
    ("plan 2 2 --granularity 3 --experts 8", 2, "error: --experts (8) must be a multiple of gr"),
    ("build recipe.yml -o out --target mixtral", 2, "--target is for models; write it into the"),
    ("build recipe.yml dense -o out", 2, "error: MODEL must be the recipe alone: it names its"),
    ("build recipe.yml -o out", 1, "error: dense_layers lists layer 7; the base model has 2,"),
    ("build absent -o out", 1, "absent: is not a folder with a model; there is no file or"),
    ("build dense", 2, "Missing option '--output' / '-o'"),
    ("build", 2, "Missing argument 'MODEL"),
    ("build dense -o out --expert 2", 2, "No such option: --expert"),
    ("convert dense -o out --max-shard-size 1x", 2, "--max-shard-size must be a size such as"),
    ("plan 0 2", 2, "error: MODELS must be at least 1, got 0"),
    ("plan 2 2 --hidden-size -1", 2, "error: --hidden-size must be at least 0, got -1"),
    ("plan 2 1000000000", 2, "error: LAYERS must be at most 134217728, got 1000000000"),
    ("route logits.npy --groups 3", 2, "error: --groups must divide 8, the number of experts"),
    ("route logits.npy --capacity-factors a", 2, "error: --capacity-factors must be numbers with"),
    ("route logits.npy --plot picture", 2, "error: --plot must end in the format of the picture"),
    ("route absent.npy", 1, "error: absent.npy: No such file"),
    ("gates 64 8 -o out.npy --dtype int8", 2, "error: --dtype must be one of float64"),
    ("gates 64 8 -o out.pt", 2, "error: --output must end in .npy or .safetensors, got 'out.pt'"),
    ("gates 0 8 -o out.npy", 2, "error: HIDDEN_SIZE must be at least 1, got 0\n"),
    ("check dense --text letter.txt", 1, "letter.txt: there is no such file"),
    ("inspect .", 1, "has no config.json; its folders with models are dense"),
    ("biuld", 2, "No such command 'biuld'"),
])  # fmt: skip
def test_what_a_wrong_value_is_told(folder, monkeypatch, arguments, code, message):
    monkeypatch.chdir(folder)
    done = run(*arguments.split())
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert not (folder / "out").exists()


def test_options_of_fine_experts_are_those_of_the_function(folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = "--granularity 4 --shuffle --reinit 0.5 --seed 3 --reinit-sets separate"
    more = "--backbone 3,1 --target glm4_moe --mix-copies"
    done = run("build", "dense", "dense", "-o", "fine", *options.split(), *more.split())
    assert done.returncode == 0, done.stderr
    assert "32 per layer (8 copies split in 4), 4 per token" in done.stdout
    design = design_moe(
        ["dense", "dense"], granularity=4, shuffle=True, reinit=0.5, seed=3, target="glm4_moe",
        reinit_sets="separate", backbone=(3, 1), mix_copies=True,
    )  # fmt: skip
    written = load_file("fine/model.safetensors")
    assert set(design.weights) == set(written)
    assert all(design.read_bytes(name) == written[name].tobytes() for name in written)
    sizes = "--granularity 4 --hidden-size 8 --intermediate-size 16"
    done = run("plan", 2, 3, *sizes.split())
    assert "32 per layer" in done.stdout
    assert f"{3 * 32 * (3 * 8 * 4 + 8):,} in experts and routers" in done.stdout


@pytest.mark.parametrize("name", ["recipe.txt", "recipe.YAML", "recipe.yaml", "recipe"])
def test_a_recipe_is_known_by_what_is_in_it(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    Path(name).write_text("# two experts\nmodels: [dense]\nnum_experts: 2\n")
    done = run("build", name, "-o", "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 per layer" in done.stdout


def test_a_recipe_may_be_json(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("recipe.json").write_text('{\n  "models": ["dense"],\n  "num_experts": 2\n}\n')
    assert run("build", "recipe.json", "-o", "out", "--dry-run").returncode == 0
    done = run("build", "dense/config.json", "-o", "out", "--dry-run")
    assert "it is a file, and a model is the folder with config.json" in done.stderr


def test_other_files_are_no_recipes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("notes.txt").write_text("The models: many.\n")
    done = run("build", "notes.txt", "-o", "out")
    assert done.returncode == 1
    assert "notes.txt: is not a folder with a model; it is a file" in done.stderr


@pytest.mark.parametrize(("address", "name"), [
    ("https://huggingface.co/org/name", "org/name"),
    ("https:/huggingface.co/org/name", "org/name"),  # as pathlib has it
    ("http://www.huggingface.co/org/name/", "org/name"),
    ("https://hf.co/org/name.v2?library=x#usage", "org/name.v2"),
    ("https://huggingface.co/org/name/tree/v1.0", "org/name@v1.0"),
    ("https://huggingface.co/org/name.git", "org/name"),
    ("https://huggingface.co/org/name/blob/main", "org/name@main"),
    ("huggingface.co/org/name", "org/name"),
    ("hf://org/name", "org/name"),
    ("hf:/models/org/name", "org/name"),
    ("git@hf.co:org/name", "org/name"),
    ("https://huggingface.co/org/name/blob/main/config.json", None),
    ("https://huggingface.co/datasets/org/name", None),
    ("https://example.org/org/name", None),
    ("org/name@main", None),
    ("dense", None),
])  # fmt: skip
def test_the_address_of_a_models_page_is_its_name(address, name):
    assert repository_name(address) == (name or address)


def test_an_address_is_looked_for_on_the_hub(folder, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    done = run("build", "https://huggingface.co/org/name", "-o", "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'org/name' is not a local folder, and not a model that")


def test_paths_in_the_home_folder(folder, monkeypatch):
    from moe_fast import (
        build_moe,
        build_recipe,
        check_moe,
        compare_moe,
        convert_moe,
        expand_moe,
        extract_dense,
        inspect_model,
        merge_experts,
        prune_moe,
        read_recipe,
        statistics_of_file,
        write_report,
        write_router_weights,
    )

    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.chdir(folder.parent)
    assert build_moe("~/dense", "~/home/moe").output == folder / "home" / "moe"
    assert convert_moe("~/home/moe", "~/home/fused", layout="fused").layout == "fused"
    assert check_moe("~/home/moe", against="~/dense").passed
    assert inspect_model("~/home/fused").num_experts == 8
    assert write_report("~/home/moe", "~/home/page.html") == folder / "home" / "page.html"
    assert statistics_of_file("~/logits.npy").num_layers == 1
    write_router_weights("~/home/r.npy", np.zeros((1, 2, 2)))
    make_dense_model("~/home/dense", seed=0)
    (folder / "home" / "r.yml").write_text("models: [~/dense]\n")
    assert read_recipe("~/home/r.yml").request.base == str(folder / "dense")
    build_recipe("~/home/r.yml", "~/home/of-recipe")
    (folder / "home" / "keep.json").write_text(json.dumps({"layers": {"0": [0, 3], "1": [2, 4]}}))
    assert prune_moe("~/home/moe", "~/home/pruned", keep="~/home/keep.json").num_experts == 2
    assert expand_moe("~/home/moe", "~/home/wide", 16).output == folder / "home" / "wide"
    assert extract_dense("~/home/moe", "~/home/out", expert=0).output == folder / "home" / "out"
    pairs = {str(layer): [[i, i + 1] for i in range(0, 8, 2)] for layer in range(2)}
    assert merge_experts("~/home/moe", "~/home/merged", {"layers": pairs}).num_experts == 4
    assert compare_moe("~/home/moe", "~/home/fused").equal
    found = {path.name for path in (folder / "home").iterdir()}
    assert found == {"moe", "fused", "page.html", "r.npy", "dense", "r.yml", "of-recipe"} | {
        *("keep.json", "pruned", "wide", "out", "merged"),
    }
    assert not Path("~").exists()


@pytest.mark.parametrize("level", ["-O", "-OO"])
def test_help_without_docstrings(level):
    done = subprocess.run(
        [sys.executable, level, "-m", "moe_fast", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for help in (command.help for command in typer.main.get_command(app).commands.values()):
        assert help[:30] in done.stdout


def test_no_arguments_are_a_wrong_command_line():
    done = run()
    assert done.returncode == 2
    assert "Usage: " in done.stdout + done.stderr


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


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_the_help_of_each_option_is_shown_whole(name):
    """Words in brackets, which rich takes for markup, included."""
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})
    shown = " ".join(done.stdout.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    for parameter in typer.main.get_command(app).commands[name].params:
        assert (getattr(parameter, "help", None) or "") in shown


@pytest.mark.parametrize(("words", "values"), [
    ("build --target ", ["auto", *moe_families()]),
    ("build --target f", ["flex_olmo"]),
    ("build --routers b", ["balanced"]),
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


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_a_command_makes_its_own_parser_alone(name):
    one = typer.main.get_command(application_for([name, "--help"]))
    assert list(one.commands) == [name]
    every = typer.main.get_command(app).commands[name]
    assert [p.opts for p in one.commands[name].params] == [p.opts for p in every.params]


@pytest.mark.parametrize("arguments", [[], ["--version", "build"], ["bild"], ["--help"]], ids=str)
def test_what_names_no_command_gets_all(arguments):
    commands = typer.main.get_command(application_for(arguments)).commands
    assert list(commands) == list(COMMANDS)


LINES = [
    "build a -o out", "build a b -o out --experts 4 --experts-per-token=1 -q --json",
    "build a --output=out --reinit 0.5 --logit-std 1e-2 --layout fused --text x --text y",
    "build a -o out --dry-run --threads 2 --max-shard-size 300MB --overwrite --base b",
    "plan 2 3 --experts 8", "gates 64 8 -o g.npy --no-transpose --keep-base --init random",
    "gates 64 8 -o g.npy --remove-base --layers 2", "demo", "demo there --overwrite", "families",
    "prune m -o out --experts 4 --scores s.json --by frequency", "route l.npy --norm",
    "route l.npy --no-norm --method switch_transformer --capacity-factor 2", "doctor --json",
    "merge m -o out --align", "expand m -o out --experts 16 --noise-scale 0.01 --seed 3",
    "inspect m --no-copies", "compare a b --tolerance 1e-3", "check m --against a --against b",
    "score m -o s.json --text a --length 12", "extract m -o d --best 2 --copy 1",
]  # fmt: skip
# What has to be said something about, or stands in the line in an uncommon way.
LEFT_TO_TYPER = [
    "build a", "build", "build a -o out --expert 4", "build a -o", "build a -o out --help",
    "build a -o out --experts -1", "build a -oout", "plan 1 2 3", "plan 2 3 --experts +4",
    "build a -o out --dry-run=1", "build -- -a", "build a -o out --experts four --help",
    "build a -o out -o other", "build a -o out --reinit .5", "plan 1", "build a -o out --text=",
    "doctor --json --json", "plan two -h",
]  # fmt: skip


def typers_values(monkeypatch, line):
    """What typer makes of a line that is right."""
    name = line.split()[0]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(COMMANDS[name], "function", lambda call, **given: seen.append((call, given)))
        command = typer.main.get_command(make_application([COMMANDS[name]]))
        command.main(line.split(), standalone_mode=False)
    return seen[0]


@pytest.mark.parametrize("line", LINES)
def test_both_parsers_agree(monkeypatch, line):
    expected, values = typers_values(monkeypatch, line)
    seen = []
    command = COMMANDS[line.split()[0]]
    monkeypatch.setattr(command, "function", lambda call, **given: seen.append((call, given)))
    monkeypatch.setattr(cli, "asks_typer", lambda arguments: False)
    assert parse(command, line.split()[1:]) is not None
    cli.run_command(line.split())
    ((call, given),) = seen
    assert call.given == expected.given
    assert given.keys() == values.keys()
    for name, value in given.items():
        other = values[name]
        if hasattr(value, "of_functions"):
            value, other = vars(value), vars(other)
        assert (type(value), value) == (type(other), other), name


@pytest.mark.parametrize("line", LEFT_TO_TYPER)
def test_what_typer_has_to_say_something_about(line):
    name, *words = line.split()
    assert parse(COMMANDS[name], words) is None


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_command_takes_words_for_numbers_and_choices(name):
    """In the words of the package, which name the option and the value."""
    command = COMMANDS[name]
    for each in command.parameters:
        if each.kind not in (int, float) and not issubclass(each.kind, StrEnum):
            continue
        if isinstance(each.declared, Argument):
            places = [p for p in command.parameters if isinstance(p.declared, Argument)]
            words = ["7"] * places.index(each) + ["wrong"]
        else:
            words = [each.opts[-1], "wrong"]
        with pytest.raises(MoeConfigError, match=r"must be .*, got 'wrong'") as caught:
            parse(command, words)
        assert caught.value.argument == each.name


def test_a_plain_line_needs_no_typer_and_no_rich():
    code = (
        "import sys; sys.argv = ['moe-fast', 'plan', '2', '4']\n"
        "from moe_fast.__main__ import main; main()\n"
        "assert not {'typer', 'rich', 'click', 'pydantic'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_enough():
    """Nothing is said where `head` closes the pipe."""
    with subprocess.Popen(
        [sys.executable, "-m", "moe_fast", "plan", "2", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
