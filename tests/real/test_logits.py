"""The check of logits: equal functions pass, a changed one fails, the others are measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from logits import compute_logits
from moe_fast import ExpertSource, MoeConfig, build_moe, check_moe, convert_moe
from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.demo import make_dense_model

CONFIG = MoeConfig(num_experts=4)
TEXT = "The quick brown fox; 2 + 2 = 4, def f(x): return x"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    make_dense_model(folder, seed=0)
    return folder


def logits(moe: Path, **options):
    report = check_moe(moe, text=TEXT, **options)
    return report["logits"]


@pytest.mark.parametrize(("target", "layout"), [
    ("mixtral", "per-expert"), ("mixtral", "fused"), ("qwen2_moe", None), ("granitemoe", None),
])  # fmt: skip
def test_copies_of_the_base_compute_what_it_does(dense, tmp_path, target, layout):
    build_moe(dense, tmp_path / "moe", CONFIG, target=target, layout=layout)
    found = logits(tmp_path / "moe")
    assert found.status == "passed", found.problems
    assert found.summary.endswith("meant to be equal")
    assert "the likeliest next token is the same for" in found.summary


def test_the_figures_are_those_of_the_models(dense, tmp_path):
    noisy = ExpertSource(dense, noise_scale=0.05)
    build_moe(noisy, tmp_path / "moe", CONFIG)
    tokens = PromptTokenizer(dense).tokens(TEXT)
    expected, _ = compute_logits(dense, tokens)
    found, _ = compute_logits(tmp_path / "moe", tokens)
    same = int((expected.argmax(-1) == found.argmax(-1)).sum())
    assert logits(tmp_path / "moe").summary == (
        f"over {len(tokens)} tokens, logits differ by at most {np.abs(found - expected).max():.2g} "
        f"at a scale of {np.abs(expected).max():.3g}, the likeliest next token is the same for "
        f"{same} of {len(tokens)}; need not be equal: experts have noise or a scale"
    )


def test_another_function_fails(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG)
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.block_sparse_moe.experts.2.w2.weight"][:] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    found = logits(tmp_path / "moe")
    assert found.status == "failed"
    assert f"moe: should compute what {dense} computes" in found.problems[0]


def test_a_conversion_is_held_to_what_it_was_made_from(dense, tmp_path):
    noisy = ExpertSource(dense, noise_scale=0.05)
    build_moe(noisy, tmp_path / "moe", CONFIG)
    convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    found = logits(tmp_path / "fused")
    assert (found.status, found.summary[-17:]) == ("passed", "meant to be equal")
    convert_moe(tmp_path / "moe", tmp_path / "half", dtype="float16")
    assert "need not be equal: weights were rounded to float16" in logits(tmp_path / "half").summary


def test_without_a_manifest_the_first_source_is_compared_with(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG)
    (tmp_path / "moe" / "moe_fast.json").unlink()
    found = logits(tmp_path / "moe", against=dense)
    assert "need not be equal: there is no manifest" in found.summary


def test_a_model_that_does_not_load_whole(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG)
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    (problem,) = logits(tmp_path / "moe").problems
    assert "does not load it whole: missing model.layers.0.input_layernorm.weight" in problem


def test_without_a_reader_or_a_tokenizer_it_is_not_possible(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG, target="deepseek")
    found = logits(tmp_path / "moe")
    assert found.status == "not possible"
    assert found.summary == "transformers 5 has no deepseek of its own"
    (dense / "tokenizer.json").rename(dense / "elsewhere.json")
    try:
        build_moe(dense, tmp_path / "silent", CONFIG)
        found = logits(tmp_path / "silent")
        assert found.status == "not possible"
        assert "tokenizer.json: is missing" in found.summary
    finally:
        (dense / "elsewhere.json").rename(dense / "tokenizer.json")


def test_the_command_takes_a_text_or_a_file(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG)
    (tmp_path / "text.txt").write_text(TEXT)
    found = []
    for text in (TEXT, tmp_path / "text.txt"):
        done = subprocess.run(
            [sys.executable, "-m", "moe_fast", "check", tmp_path / "moe", "--text", text, "--json"],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads(done.stdout)["findings"][-1])
    assert found[0] == found[1]
    assert found[0]["check"] == "logits"
