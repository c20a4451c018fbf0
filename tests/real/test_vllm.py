"""Outputs of every family, run by vLLM: it computes what the check says that it does.

vLLM runs in the environment whose Python MOE_FAST_VLLM names. Its attention wants heads of 32.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from forward import Model
from logits import assert_same, compute_logits, log_softmax
from moe_fast import MoeConfig, build_moe, check_moe
from random_models import build_random_moe, save_random_model

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
TOKENS = np.random.default_rng(0).integers(96, size=40).tolist()
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
SOURCES = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "olmo2, biases": ("olmo2", {"attention_bias": True}),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 8.0}),
}
FUSED, SHARED = {"layout": "fused"}, {"shared_experts": True}
CASES = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", FUSED),
    ("llama", "qwen2_moe", SHARED),
    ("llama", "granitemoeshared", SHARED),
    ("llama", "deepseek", {}),
    ("llama", "deepseek", SHARED),
    ("llama, biases", "granitemoe", {}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", FUSED),
    ("qwen2", "qwen2_moe", {"dense_layers": (0, 2)}),
    ("qwen3", "qwen3_moe", {}),
    ("qwen3", "qwen3_moe", FUSED),
    ("qwen3, biases", "qwen3_moe", {}),
    ("olmo2, biases", "flex_olmo", {}),
    ("olmo2, biases", "flex_olmo", FUSED),
    ("granite", "granitemoe", {}),
]
# DeepSeek keeps its configuration's code on the Hub; this does the same.
CODE = """
from transformers import PretrainedConfig

class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"

    def __init__(self, **keys):
        vars(self).update(keys)
        super().__init__(**keys)
"""


def with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_deepseek.py").write_text(CODE)


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> list[Path]:
    scratch = tmp_path_factory.mktemp("vllm")
    for source, (family, changes) in SOURCES.items():
        save_random_model(scratch / source, family, **SIZES | changes)
    return [
        build_random_moe(scratch / source, scratch / f"moe{i}", CONFIG, target, options)
        for i, (source, target, options) in enumerate(CASES)
    ]


@pytest.fixture(scope="session")
def smollm2_moe(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "smollm2"
    build_moe(smollm2, folder, CONFIG)
    return folder


@pytest.fixture(scope="session")
def vllm(outputs, smollm2_moe) -> list[np.ndarray | str]:
    """Log-probabilities of every case and of SmolLM2, or why vLLM did not load it.

    One process does it all, because importing vLLM takes ten seconds.
    """
    python = os.environ.get("MOE_FAST_VLLM")
    assert python, "MOE_FAST_VLLM must name a Python with vLLM for the CPU"
    scratch = smollm2_moe.parent
    for folder, (_, target, _) in zip(outputs, CASES, strict=True):
        if target == "deepseek":
            with_code(folder)
    folders = [*map(str, outputs), str(smollm2_moe)]
    (scratch / "jobs.json").write_text(json.dumps([[folder, TOKENS] for folder in folders]))
    command = [python, Path(__file__).with_name("vllm_logits.py"), "jobs.json", "likely.npz"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    assert done.returncode == 0, done.stderr[-5000:]
    with np.load(scratch / "likely.npz") as file:
        return [
            file[f"likely{i}"] if f"likely{i}" in file else str(file[f"error{i}"])
            for i in range(len(folders))
        ]


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{s} to {t}, {' '.join(o)}" for s, t, o in CASES]
)
def test_vllm_computes_it_where_the_check_says_so(vllm, outputs, case):
    folder, found = outputs[case], vllm[case]
    (reader,) = (reader for reader in check_moe(folder).readers if reader.name == "vLLM")
    if CASES[case][1] == "deepseek":
        expected = log_softmax(Model(folder).logits(np.array(TOKENS)))
    else:
        logits, problems = compute_logits(folder, TOKENS)
        assert not problems
        expected = log_softmax(logits)
    if reader.loads:
        assert not isinstance(found, str), found
        assert_same(found, expected, 2e-5)
    elif isinstance(found, str):
        assert "no module or parameter named" in found
    else:  # without a word, but of something else
        assert np.abs(found - expected).max() > 0.1


def test_vllm_answers_as_the_dense_smollm2_does(vllm, smollm2):
    logits, _ = compute_logits(smollm2, TOKENS)
    assert_same(vllm[-1], log_softmax(logits), 1e-4)
