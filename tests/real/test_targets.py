"""Every source family in every target it fits, judged by transformers.

Version 5 runs here; version 4 in the environment whose Python MOE_FAST_TRANSFORMERS4 names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers import AutoTokenizer

from families import LINEAR, LLAMA3, LONGROPE, YARN
from folders import config_of
from forward import Model
from logits import assert_same, compute_logits
from moe_fast import MoeConfig, build_moe
from random_models import save_random_model

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
TOKENS = np.random.default_rng(0).integers(96, size=40).tolist()
THETA = {"rope_theta": 1e4}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
LLAMA_LIKE = ("mixtral", "qwen2_moe", "granitemoe", "granitemoeshared")
SOURCES = {
    "llama": ("llama", {}, LLAMA_LIKE),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, LLAMA_LIKE),
    "llama, biases": ("llama", {"attention_bias": True}, ("granitemoe", "granitemoeshared")),
    "llama, head_dim": ("llama", {"head_dim": 20}, ("mixtral",)),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, LLAMA_LIKE),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR | THETA}, LLAMA_LIKE),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN | THETA}, LLAMA_LIKE),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE | THETA}, LLAMA_LIKE),
    "mistral": ("mistral", {"sliding_window": None}, LLAMA_LIKE),
    "mistral, window": ("mistral", {"sliding_window": 7}, ("mixtral", "qwen2_moe")),
    "qwen2": ("qwen2", {}, ("qwen2_moe",)),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, ("qwen2_moe",)),
    "qwen2, window": ("qwen2", WINDOW, ("qwen2_moe",)),
    "qwen3": ("qwen3", {"head_dim": 16}, ("qwen3_moe",)),
    "qwen3, tied": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}, ("qwen3_moe",)),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}, ("qwen3_moe",)),
    "qwen3, window": ("qwen3", {"head_dim": 16, **WINDOW}, ("qwen3_moe",)),
    "qwen3, yarn rope": (
        "qwen3",
        {"head_dim": 16, "rope_parameters": YARN | THETA},
        ("qwen3_moe",),
    ),
    "olmo2": ("olmo2", {}, ("flex_olmo",)),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}, ("flex_olmo",)),
    "olmo2, biases": ("olmo2", {"attention_bias": True}, ("flex_olmo",)),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        ("granitemoe", "granitemoeshared"),
    ),
    "granite, tied, biases": (
        "granite",
        {"tie_word_embeddings": True, "attention_bias": True},
        ("granitemoe", "granitemoeshared"),
    ),
}
# GraniteMoE has one layout and is built in it whatever is asked.
CASES = [
    pytest.param(source, target, layout, id=f"{source} to {target}, {layout or 'its own'}")
    for source, (_, _, targets) in SOURCES.items()
    for target in targets
    for layout in ((None,) if "granite" in target else ("per-expert", "fused"))
]


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """The folder of a source and its logits, made once."""
    made = {}

    def make(source: str) -> tuple[Path, np.ndarray]:
        if source not in made:
            family, changes, _ = SOURCES[source]
            folder = tmp_path_factory.mktemp("dense") / "model"
            save_random_model(folder, family, **changes)
            logits, problems = compute_logits(folder, TOKENS)
            assert not problems
            made[source] = folder, logits
        return made[source]

    return make


# Ropes that the twin of the ordinary tests does not have.
@pytest.mark.parametrize(
    "source", [source for source in SOURCES if "yarn" not in source and "longrope" not in source]
)
def test_the_plain_twin_computes_what_transformers_does(dense, source):
    folder, expected = dense(source)
    config = config_of(folder)
    rope = config["rope_parameters"]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    model = Model(folder)
    model.config = config
    assert_same(model.logits(np.array(TOKENS)), expected, 1e-5)


@pytest.mark.parametrize(("source", "target", "layout"), CASES)
def test_transformers_5_loads_it_whole_and_it_computes_the_same(
    dense, tmp_path, source, target, layout
):
    assert transformers.__version__.startswith("5.")
    folder, expected = dense(source)
    build_moe(folder, tmp_path / "moe", CONFIG, target=target, layout=layout)
    logits, problems = compute_logits(tmp_path / "moe", TOKENS)
    assert not problems
    assert_same(logits, expected, 2e-5)


# Qwen's families alone have layers without experts, among those that transformers knows.
DENSE = [("qwen2", "qwen2_moe"), ("llama, tied", "qwen2_moe"), ("qwen3", "qwen3_moe")]
DENSE_LAYERS = (0, 2)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize(("source", "target"), DENSE)
def test_transformers_5_knows_the_layers_without_experts(dense, tmp_path, source, target, layout):
    folder, expected = dense(source)
    options = {"target": target, "layout": layout, "dense_layers": DENSE_LAYERS}
    build_moe(folder, tmp_path / "moe", CONFIG, **options)
    logits, problems = compute_logits(tmp_path / "moe", TOKENS)
    assert not problems
    assert_same(logits, expected, 2e-5)


TRANSFORMERS_4 = [case.values[:2] for case in CASES if case.values[2] != "fused"]


@pytest.fixture(scope="session")
def transformers_4(dense, smollm2, smollm2_tokens, tmp_path_factory):
    """What transformers 4 makes of every output in the layout that it reads: logits and problems.

    One process does it all, because importing torch and transformers takes seconds.
    """
    python = os.environ.get("MOE_FAST_TRANSFORMERS4")
    assert python, "MOE_FAST_TRANSFORMERS4 must name a Python with torch and transformers 4"
    scratch = tmp_path_factory.mktemp("transformers4")
    jobs = {}
    for source, target in TRANSFORMERS_4:
        folder = scratch / f"{len(jobs)}"
        build_moe(dense(source)[0], folder, CONFIG, target=target)
        jobs[source, target] = (str(folder), TOKENS)
    for source, target in DENSE:
        folder = scratch / f"{len(jobs)}"
        build_moe(dense(source)[0], folder, CONFIG, target=target, dense_layers=DENSE_LAYERS)
        jobs[source, target, "dense layers"] = (str(folder), TOKENS)
    for target in ("mixtral", "qwen2_moe"):
        build_moe(smollm2, scratch / target, CONFIG, target=target)
        jobs["smollm2", target] = (str(scratch / target), smollm2_tokens)
    (scratch / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [python, Path(__file__).with_name("logits.py"), "jobs.json", "logits.npz"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    assert done.returncode == 0, done.stderr
    with np.load(scratch / "logits.npz") as file:
        assert str(file["version"]).startswith("4.")
        return {
            job: (file[f"logits{i}"], file[f"problems{i}"].tolist()) for i, job in enumerate(jobs)
        }


@pytest.mark.parametrize(("source", "target"), TRANSFORMERS_4)
def test_transformers_4_loads_it_whole_and_it_computes_the_same(
    dense, transformers_4, source, target
):
    logits, problems = transformers_4[source, target]
    assert not problems
    assert_same(logits, dense(source)[1], 2e-5)


@pytest.mark.parametrize(("source", "target"), DENSE)
def test_transformers_4_knows_the_layers_without_experts(dense, transformers_4, source, target):
    logits, problems = transformers_4[source, target, "dense layers"]
    assert not problems
    assert_same(logits, dense(source)[1], 2e-5)


@pytest.fixture(scope="session")
def smollm2_tokens(smollm2) -> list[int]:
    return AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids


TEXT = "The mitochondrion is the powerhouse of the cell, and 2 + 2 = 4; def f(x): return x"


SMOLLM2 = [case.values[1:] for case in CASES if case.values[0] == "llama"]


@pytest.mark.parametrize(("target", "layout"), SMOLLM2)
def test_smollm2_in_every_target_it_fits(smollm2, smollm2_tokens, tmp_path, target, layout):
    expected, _ = compute_logits(smollm2, smollm2_tokens)
    build_moe(smollm2, tmp_path / "moe", CONFIG, target=target, layout=layout)
    logits, problems = compute_logits(tmp_path / "moe", smollm2_tokens)
    assert not problems
    assert_same(logits, expected, 1e-4)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_smollm2_in_transformers_4(smollm2, smollm2_tokens, transformers_4, target):
    expected, _ = compute_logits(smollm2, smollm2_tokens)
    logits, problems = transformers_4["smollm2", target]
    assert not problems
    assert_same(logits, expected, 1e-4)
