"""Outputs of every family, run by vLLM: it computes what the check says that it does.

vLLM runs in the environment whose Python MOE_FAST_VLLM names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from logits import assert_same, compute_logits, log_softmax
from moe_fast import MoeConfig, build_moe
from random_models import build_random_moe, save_random_model
from reader_cases import CASES, SIZES, SOURCES, expected_of, name_of, reader_of

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
TOKENS = np.random.default_rng(0).integers(96, size=40).tolist()
# What vLLM says where it does not load a model.
REFUSALS = (
    "no module or parameter named",
    "Model architectures [",  # it has none of that name
    "is_act_and_mul=False is supported only for",  # experts without a gate
)
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
    for source in {source for source, _, _ in CASES}:
        family, changes = SOURCES[source]
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


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(name_of, CASES))
def test_vllm_computes_it_where_the_check_says_so(vllm, outputs, case):
    folder, found = outputs[case], vllm[case]
    expected = expected_of(folder, TOKENS)
    reader = reader_of(folder, "vLLM")
    if reader.loads:
        assert not isinstance(found, str), found
        assert_same(found, expected, 2e-5)
    elif isinstance(found, str):
        assert any(each in found for each in REFUSALS), found
    else:  # without a word, but of something else
        assert np.abs(found - expected).max() > 0.1


def test_vllm_answers_as_the_dense_smollm2_does(vllm, smollm2):
    logits, _ = compute_logits(smollm2, TOKENS)
    assert_same(vllm[-1], log_softmax(logits), 1e-4)
