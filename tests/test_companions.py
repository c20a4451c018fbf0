"""What belongs to a model besides its weights: copied whole, compared whole, never run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from families import make_model
from folders import edit_json, rewrite
from moe_fast import (
    CheckpointError,
    MoeConfig,
    build_moe,
    check_moe,
    convert_moe,
    expand_moe,
    merge_experts,
    prune_moe,
)
from moe_fast.checkpoint import output
from moe_fast.checkpoint.check import Status
from moe_fast.demo import make_dense_model
from moe_fast.storage.companions import code_beside, find_companions

CONFIG = MoeConfig(num_experts=2)
BOMB = "raise SystemExit('this must never run')\n"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


def write(folder: Path, *names: str, text: str = BOMB) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text + name)


def files_below(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def own_tokenizer(folder: Path, *files: str) -> None:
    reference = "tokenization_own.OwnTokenizer"
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, reference]})
    write(folder, *files)


TEMPLATES = ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja")


def untie(folder: Path) -> None:
    """Store the head apart, as DeepSeek's readers want it."""
    edit_json(folder / "config.json", tie_word_embeddings=False)
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})


def test_templates_in_their_folder_are_copied_and_compared(dense, tmp_path):
    write(dense, "chat_template.jinja", *TEMPLATES, "additional_chat_templates/notes.txt")
    build_moe(dense, tmp_path / "moe", CONFIG, checksum=True, fsync=True)
    convert_moe(tmp_path / "moe", tmp_path / "half", dtype="float16")
    for folder in (tmp_path / "half", tmp_path / "moe"):
        for name in ("chat_template.jinja", *TEMPLATES):
            assert (folder / name).read_text() == (dense / name).read_text()
        assert not (folder / "additional_chat_templates/notes.txt").exists()
        assert check_moe(folder).passed
        files = json.loads((folder / "moe_fast.json").read_text())["files"]
        assert files.keys() == files_below(folder) - {"moe_fast.json"}
        (folder / TEMPLATES[0]).write_text("another")
        report = check_moe(folder)
        assert report["manifest"].status is Status.FAILED
        assert f"{folder / TEMPLATES[0]}: differs from " in report["tokenizer"].problems[0]
        (folder / TEMPLATES[0]).unlink()
        assert "is missing; the source has it" in check_moe(folder)["tokenizer"].problems[0]


def test_a_build_goes_on_from_one_that_was_cut_off_among_templates(dense, tmp_path, monkeypatch):
    write(dense, *TEMPLATES)
    copied = output.copy_file

    def stop(source: Path, file: Path, **options: object) -> object:
        if source.name == "tool_use.jinja":
            raise KeyboardInterrupt("stop")
        return copied(source, file, **options)

    monkeypatch.setattr(output, "copy_file", stop)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        build_moe(dense, tmp_path / "moe", CONFIG)
    (kept,) = tmp_path.glob(".moe.partial/*/additional_chat_templates")
    assert [file.name for file in kept.iterdir()] == ["rag.jinja"]
    monkeypatch.undo()
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert check_moe(tmp_path / "moe").passed
    assert files_below(tmp_path / "moe") >= {*TEMPLATES}


@pytest.mark.parametrize("name", ["../moe/config.json", "/etc/passwd", "a//b", "a/../b", "C:x"])
def test_a_manifest_names_files_below_its_folder_alone(dense, tmp_path, name):
    build_moe(dense, tmp_path / "moe", CONFIG)
    edit_json(tmp_path / "moe" / "moe_fast.json", files={name: {"size": 1}})
    problems = check_moe(tmp_path / "moe")["manifest"].problems
    assert f"{name!r} is not the name of a file in the folder" in problems[0]


def test_code_of_a_tokenizer_goes_with_it(dense, tmp_path):
    own_tokenizer(dense, "tokenization_own.py", "imported.py", "scripts/train.py")
    report = build_moe(dense, tmp_path / "moe", CONFIG)
    assert report.warnings == ()
    report = convert_moe(tmp_path / "moe", tmp_path / "half", dtype="float16")
    assert report.warnings == ()
    for folder in (tmp_path / "half", tmp_path / "moe"):
        names = {name for name in files_below(folder) if name.endswith(".py")}
        assert names == {"tokenization_own.py", "imported.py"}
        assert check_moe(folder).passed
        (folder / "imported.py").write_text("import os")
        assert "imported.py: differs from" in check_moe(folder)["tokenizer"].problems[0]


def test_code_that_nothing_names_stays(dense, tmp_path):
    write(dense, "modeling_llama.py", "tokenizer.py", "tokenizer.pkl")
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert not {"modeling_llama.py", "tokenizer.py", "tokenizer.pkl"} & files_below(
        tmp_path / "moe"
    )


def test_code_of_a_model_goes_with_a_conversion(dense, tmp_path):
    moe = tmp_path / "moe"
    untie(dense)
    build_moe(dense, moe, CONFIG, target="deepseek")
    config = json.loads((moe / "config.json").read_text())
    assert convert_moe(moe, tmp_path / "same").warnings == ()  # it lies in a repository
    here = {key: value.partition("--")[2] for key, value in config["auto_map"].items()}
    edit_json(moe / "config.json", auto_map=here)
    *warnings, last = convert_moe(moe, tmp_path / "without", dry_run=True).warnings
    assert last.startswith("no reader loads a deepseek")
    assert sorted(warnings) == [
        f"{moe / 'config.json'}: auto_map names code in {name}, which is not beside it; readers "
        "that need it fail without"
        for name in ("configuration_deepseek.py", "modeling_deepseek.py")
    ]
    write(moe, "configuration_deepseek.py", "modeling_deepseek.py", "rope.py")
    report = convert_moe(moe, tmp_path / "half", dtype="bfloat16")
    assert report.warnings == ()
    expected = {"configuration_deepseek.py", "modeling_deepseek.py", "rope.py"}
    assert expected <= files_below(tmp_path / "half")
    assert check_moe(tmp_path / "half", against=moe)["tokenizer"].status is Status.PASSED


KEEP = {"layers": {"0": [0, 1], "1": [0, 1]}}
GROUPS = {"layers": {"0": [[0, 1], [2, 3]], "1": [[0, 1], [2, 3]]}}
OPERATIONS = {
    "prune": lambda moe, out: prune_moe(moe, out, keep=KEEP),
    "merge": lambda moe, out: merge_experts(moe, out, groups=GROUPS),
    "expand": lambda moe, out: expand_moe(moe, out, 8),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_code_of_a_model_goes_with_every_operation(dense, tmp_path, operation):
    moe, out = tmp_path / "moe", tmp_path / "out"
    untie(dense)
    build_moe(dense, moe, MoeConfig(num_experts=4), target="deepseek")
    config = json.loads((moe / "config.json").read_text())
    here = {key: value.partition("--")[2] for key, value in config["auto_map"].items()}
    edit_json(moe / "config.json", auto_map=here)
    code = {"configuration_deepseek.py", "modeling_deepseek.py"}
    warnings = OPERATIONS[operation](moe, out).warnings
    named = [warning for warning in warnings if warning.startswith(f"{moe / 'config.json'}: auto")]
    assert len(named) == len(code)
    write(moe, *code)
    OPERATIONS[operation](moe, tmp_path / "other")
    assert code <= files_below(tmp_path / "other")
    assert check_moe(tmp_path / "other")["tokenizer"].status is Status.PASSED


def test_what_no_reader_loads_is_said(dense, tmp_path):
    moe = tmp_path / "moe"
    (warning,) = build_moe(dense, moe, CONFIG, target="deepseek").warnings
    assert warning.startswith(f"no reader loads a deepseek made of {dense}: transformers 4 has no ")
    assert "vLLM wants a head of its own" in warning
    assert loading(moe) == set()
    (warning,) = convert_moe(moe, tmp_path / "half", dtype="bfloat16").warnings
    assert warning.startswith(f"no reader loads a deepseek made of {moe}: ")


def test_the_card_says_what_code_must_be_trusted(dense, tmp_path):
    build_moe(dense, tmp_path / "plain", CONFIG)
    assert "trust_remote_code" not in (tmp_path / "plain/README.md").read_text()
    own_tokenizer(dense, "tokenization_own.py")
    build_moe(dense, tmp_path / "moe", CONFIG)
    card = (tmp_path / "moe/README.md").read_text()
    assert "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)" in card
    assert 'AutoModelForCausalLM.from_pretrained(path, dtype="auto")' in card


def loading(folder: Path) -> set[str]:
    return {reader.name for reader in check_moe(folder).readers if reader.loads}


def test_code_that_is_not_there_is_said_and_does_not_load(dense, tmp_path):
    own_tokenizer(dense)
    moe = tmp_path / "moe"
    (warning,) = build_moe(dense, moe, CONFIG).warnings
    words = "tokenizer_config.json: auto_map names code in tokenization_own.py, which is not beside"
    assert warning.startswith(f"{dense}{os.sep}{words}")
    assert loading(moe) == {"llama.cpp"}
    for reader in check_moe(moe).readers:
        assert reader.loads or words in reader.reasons[-1]
    write(moe, "tokenization_own.py")
    assert loading(moe) == {"transformers 4", "transformers 5", "vLLM", "llama.cpp"}


def test_code_of_a_model_that_transformers_lacks_is_needed(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    for target, needed in (("mixtral", False), ("deepseek", True)):
        moe = tmp_path / target
        build_moe(dense, moe, CONFIG, target=target)
        before = loading(moe)
        edit_json(moe / "config.json", auto_map={"AutoConfig": "configuration_own.Config"})
        assert loading(moe) == (before - {"vLLM"} if needed else before)
        write(moe, "configuration_own.py")
        assert loading(moe) == before
        assert "vLLM" in before


@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        ({"AutoTokenizer": ["a.Slow", "b.Fast"]}, {"a.py", "b.py"}),
        ({"AutoTokenizer": [None, "a.Fast"], "AutoConfig": "c.Config"}, {"a.py", "c.py"}),
        ({"AutoConfig": "org/repository--c.Config"}, set()),
        ({"AutoConfig": "../c.Config", "x": "/etc/c.y", "z": ".a", "w": ""}, set()),
        ({"AutoConfig": 3, "AutoModel": {"a.b": 1}, "AutoTokenizer": [[], "a"]}, set()),
        (["a.b"], set()),
        (None, set()),
    ],
)
def test_what_an_auto_map_names(auto_map, files):
    assert code_beside({"auto_map": auto_map}) == files
    assert code_beside({}) == code_beside(auto_map) == set()


@pytest.mark.parametrize("text", ["{", "[1]", '{"auto_map": 3}', "", '{"a": NaN}'])
def test_a_configuration_of_a_tokenizer_that_does_not_hold_is_copied(dense, tmp_path, text):
    (dense / "tokenizer_config.json").write_text(text)
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert (tmp_path / "moe" / "tokenizer_config.json").read_text() == text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("name", ["tokenization_own.py", TEMPLATES[0]])
def test_a_fifo_among_them(dense, tmp_path, name):
    own_tokenizer(dense)
    (dense / name).parent.mkdir(exist_ok=True)
    os.mkfifo(dense / name)
    with pytest.raises(CheckpointError, match=f"{Path(name).name}: is not a regular file"):
        build_moe(dense, tmp_path / "moe", CONFIG)


def test_a_file_among_them_that_became_huge_is_not_read_whole(dense, tmp_path):
    """Eight gigabytes that take no room on the disk, in place of a tokenizer."""
    resource = pytest.importorskip("resource")
    moe = tmp_path / "moe"
    build_moe(dense, moe, CONFIG)
    (moe / "moe_fast.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        with (moe / name).open("wb") as file:
            file.truncate(8 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = check_moe(moe, against=dense)
    assert "tokenizer.json: differs from" in "".join(report["tokenizer"].problems)
    unit = 1 if sys.platform == "darwin" else 1024
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken * unit < 500_000_000


def test_large_files_are_compared_to_the_end(dense, tmp_path):
    data = bytes(3 * 2**20)
    (dense / "tokenizer.model").write_bytes(data)
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert check_moe(tmp_path / "moe").passed
    (tmp_path / "moe" / "tokenizer.model").write_bytes(data[:-1] + b"x")
    assert "tokenizer.model: differs from" in check_moe(tmp_path / "moe").problems[0]


def test_companions_are_named_by_their_path(dense):
    write(dense, *TEMPLATES)
    found = find_companions(dense)
    assert all(dense / name == file for name, file in found.items())
    assert {*TEMPLATES, "tokenizer.json", "tokenizer_config.json"} <= found.keys()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_floats_are_written_as_floats_by_every_operation(dense, tmp_path, operation):
    """transformers 5 refuses 0 where it wants 0.0."""
    moe, out = tmp_path / "moe", tmp_path / "out"
    build_moe(dense, moe, MoeConfig(num_experts=4))
    edit_json(moe / "config.json", attention_dropout=0, rope_theta=10000, rms_norm_eps=1)
    OPERATIONS[operation](moe, out)
    text = (out / "config.json").read_text()
    for line in ('"attention_dropout": 0.0,', '"rope_theta": 10000.0,', '"rms_norm_eps": 1.0,'):
        assert line in text
    assert check_moe(out).passed
