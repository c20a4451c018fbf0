"""The HTML page about a checkpoint: true, self-contained, harmless."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from command import run
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    build_moe,
    check_moe,
    expand_moe,
    extract_dense,
    inspect_model,
    merge_experts,
    prune_moe,
    reroute_moe,
    write_report,
)
from moe_fast.checkpoint.convert import convert_moe
from moe_fast.command.page import find_part
from moe_fast.demo import make_dense_model
from moe_fast.models.moe import open_moe_model

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
VOID = {"meta"}


class Page(HTMLParser):
    """A page read as a browser reads it: cells of tables, all text, all tags and attributes."""

    def __init__(self, file):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], set(), [], []
        self.source = Path(file).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture
def dense(tmp_path):
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Reports are written here."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def moe(dense):
    make_dense_model(dense.parent / "other", seed=1)
    build_moe([dense, ExpertSource(dense.parent / "other", noise_scale=0.01)],
              dense.parent / "moe", CONFIG)  # fmt: skip
    return dense.parent / "moe"


def test_it_lies_in_the_working_directory_and_tells_of_the_model(moe, monkeypatch):
    file = write_report(moe)
    assert file == Path("moe-report.html")
    assert not (moe.parent / "moe-report.html").exists()
    text = Page(file).text
    assert "MixtralForCausalLM: 4 experts per layer, 2 per token, from 2 dense models." in text
    assert "1: other\n0, 2\n4\nnone" not in text
    assert "0\ndense\n0, 2\n4\nnone\n1\nother\n1, 3\n4\nnoise of 0.01" in text
    assert "Everything else comes from dense." in text
    assert "no two experts tie" in text
    assert "✓ transformers 5\nloads it" in text
    monkeypatch.chdir(moe)
    assert write_report(".") == file  # named after the folder, wherever one stands


def test_routers_are_those_that_inspect_finds(moe):
    text = Page(write_report(moe)).text
    for router in inspect_model(moe).routers:
        norms = (router.smallest_norm, router.greatest_norm)
        predicted = (router.coefficient_of_variation, router.mean_entropy)
        cells = [f"{router.layer}", *(f"{norm:#.4g}" for norm in norms)]
        cells += [f"{router.most_alike:#.6g}", "0", *(f"{value:#.4g}" for value in predicted)]
        assert "\n".join(cells) in text
    assert "Predicted on random tokens, the load’s coefficient of variation is 0." in text


def test_it_needs_nothing_and_shows_no_path(moe):
    page = Page(write_report(moe, check=check_moe(moe)))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert set(re.findall(r"https?://[^\s\"']+", page.source)) == {"http://www.w3.org/2000/svg"}
    assert str(moe.parent) not in page.source


def test_names_are_text_and_nothing_else(tmp_path):
    name = "<img src=x onerror=alert(1)>&\"'" if sys.platform != "win32" else "a&b'c"
    make_dense_model(tmp_path / name, seed=0)
    build_moe(tmp_path / name, tmp_path / f"{name}-moe", CONFIG)
    page = Page(write_report(tmp_path / f"{name}-moe"))
    assert "img" not in page.tags
    assert f"Everything else comes from {name}." in page.text


def test_the_check_is_part_of_it(moe):
    text = Page(write_report(moe, check=check_moe(moe))).text
    assert "Every check passed." in text
    assert "✓ passed\nexperts\n8 experts equal their sources, byte for byte" in text
    with (moe / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    text = Page(write_report(moe, check=check_moe(moe))).text
    assert "Some checks failed." in text
    assert "✗ failed" in text
    assert "differs" in text
    assert "Check" not in Page(write_report(moe)).texts


@pytest.mark.parametrize(("target", "layout"), [
    ("mixtral", "per-expert"), ("mixtral", "fused"), ("qwen2_moe", "per-expert"),
    ("granitemoe", None), ("deepseek", None),
])  # fmt: skip
def test_every_byte_has_its_part(dense, target, layout):
    moe = dense.parent / "moe"
    build_moe(dense, moe, CONFIG, target=target, layout=layout)
    model = open_moe_model(moe)
    parts = {}
    for name, tensor in model.tensors.items():
        parts[find_part(name)] = parts.get(find_part(name), 0) + math.prod(tensor.shape)
    assert parts["experts"] == 2 * 4 * 3 * 64 * 128
    assert parts["routers"] == 2 * 4 * 64
    assert parts["embeddings and head"] == 256 * 64
    assert parts["attention"] >= 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert "dense FFN" not in parts
    text = Page(write_report(moe)).text
    for part, count in parts.items():
        assert f"{part}\n{count:,}\n{4 * count:,}" in text
    assert ("shared experts" in parts) == any(".shared_" in name for name in model.tensors)


def test_a_converted_model(moe):
    convert_moe(moe, moe.parent / "fused", layout="fused")
    text = Page(write_report(moe.parent / "fused")).text
    assert "converted from moe." in text
    assert "Where the experts come from" not in text


@pytest.mark.parametrize(
    ("operate", "heading", "said"),
    [
        (
            lambda moe, out: prune_moe(moe, out, keep=[0, 2]),
            "2 experts per layer, 2 per token, pruned from moe.",
            ["Of 4 experts in each layer, these are kept.", "layer", "kept", "all", "0, 2"],
        ),
        (
            lambda moe, out: prune_moe(
                moe, out, num_experts=2, by="worth",
                scores={"layers": {"0": {"worth": [4, 3, 2, 1]}, "1": {"worth": [1, 2, 3, 4]}}},
            ),
            "2 experts per layer, 2 per token, pruned from moe.",
            ["worth", ".", "layer", "kept", "0", "0-1", "1", "2-3"],
        ),
        (
            lambda moe, out: merge_experts(moe, out, groups=[[0, 3], [1, 2]]),
            "2 experts per layer, 2 per token, merged from moe.",
            ["Each of these groups of 4 experts became its mean.", "layer", "groups", "all",
             "0 + 3, 1 + 2"],
        ),
        (
            lambda moe, out: expand_moe(moe, out, num_experts=8),
            "8 experts per layer, 4 per token, expanded from moe.",
            ["Of 4 experts in each layer, these are copies.", "layer",
             "each new expert is a copy of", "all", "0-3, 0-3"],
        ),
        (
            lambda moe, out: extract_dense(moe, out, mean=True),
            "a dense model, without experts, extracted from moe.",
            ["Of 4 experts in each layer, the FFN is the mean of:", "layer", "experts", "all",
             "0-3"],
        ),
        (
            lambda moe, out: reroute_moe(moe, out, routers="normal"),
            "4 experts per layer, 2 per token, rerouted from moe.",
            ["The routers were made anew:", "normal", ". Every other weight is unchanged."],
        ),
    ],
)  # fmt: skip
def test_what_an_operation_did(moe, tmp_path, operate, heading, said):
    operate(moe, tmp_path / "operated")
    page = Page(write_report(tmp_path / "operated"))
    assert heading in page.text
    assert "\n".join(said) in page.text
    assert "always tie" not in page.text


def test_long_tables_are_folded_and_one_source_needs_no_picture(tmp_path):
    for seed in range(13):
        make_dense_model(tmp_path / f"dense-{seed}", seed=seed)
    for number in (1, 12, 13):
        models = [tmp_path / f"dense-{seed}" for seed in range(number)]
        build_moe(models, tmp_path / "moe", MoeConfig(13, 2), overwrite=True)
        page = Page(write_report(tmp_path / "moe"))
        assert ("13 models" in page.texts) == (number == 13)
        assert ("Source model of each expert of each layer" in page.source) == (number > 1)


def test_what_others_made(moe, dense):
    (moe / "moe_fast.json").unlink()
    text = Page(write_report(moe)).text
    assert "4 experts per layer" in text
    assert "Model written by another tool, this page by moe_fast" in text
    assert "a dense model, without experts" in Page(write_report(dense)).text


def test_digests_are_shown_where_they_are_known(dense):
    report = build_moe(dense, dense.parent / "moe", CONFIG, checksum=True)
    manifest = json.loads((report.output / "moe_fast.json").read_text())
    digest = manifest["files"]["model.safetensors"]["sha256"]
    assert digest in Page(write_report(report.output)).text


def test_an_earlier_report_is_replaced_and_nothing_else_is(moe, tmp_path):
    file = write_report(moe)
    before = file.read_bytes()
    assert write_report(moe).read_bytes() == before
    other = tmp_path / "thesis.html"
    other.write_text("years of work")
    for there in (other, moe, moe / "config.json"):
        problem = "is a folder" if there == moe else "exists and is not a report; choose another"
        with pytest.raises(CheckpointError, match=problem):
            write_report(moe, there)
    assert other.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".moe-report")) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"source_model": [[0, 1, 0, 1], [0, 1]]}, "moe_fast.json: "),
    ({"source_model": [[0, 1, 0, 7]] * 2}, "source_model holds 7, but num_models is 2"),
    ({"source_layer": [[0, -1, 0, 0]] * 2}, "source_layer must be at least 0, got -1"),
    ({"moe_fast": 3}, "must be a string, got 3"),
])  # fmt: skip
def test_a_manifest_that_does_not_hold(moe, change, message):
    file = moe / "moe_fast.json"
    manifest = json.loads(file.read_text())
    for key, value in change.items():
        (manifest if key in manifest else manifest["facts"])[key] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        write_report(moe)
    assert not Path("moe-report.html").exists()


def test_the_command(moe):
    pytest.importorskip("typer")
    done = run("report", "moe", "--check", "-o", "page.html", cwd=moe.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "page.html\n", "")
    assert "Every check passed." in Page(moe.parent / "page.html").text
    done = run("report", "nowhere", cwd=moe.parent)
    assert done.returncode == 1
    assert "nowhere: is not a folder with a model" in done.stderr
    shutil.rmtree(moe.parent / "dense")
    done = run("report", "moe", cwd=moe.parent)  # the sources are not needed
    assert done.returncode == 0
