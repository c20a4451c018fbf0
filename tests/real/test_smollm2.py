"""The main job on a real, trained model, judged by transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from moe_fast import plan_moe_construction

TEXTS = [
    "The mitochondrion is the powerhouse of the cell, and it was once a creature of its own.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "3.14159 26535 89793 23846 26433 83279 50288 41971 69399 37510",
    "Der Zug nach München fährt heute von Gleis vier ab und hat zehn Minuten Verspätung.",
]


def build(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_fast", "build", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="session")
def upcycled(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("upcycled") / "moe"
    build(smollm2, "-o", output, "--experts", 8, "--experts-per-token", 2)
    return output


@pytest.fixture(scope="session")
def models(smollm2: Path, upcycled: Path):
    dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    moe, info = MixtralForCausalLM.from_pretrained(
        upcycled, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return dense.eval(), moe.eval()


@pytest.mark.parametrize("text", TEXTS, ids=["English", "Python", "numbers", "German"])
def test_logits_are_the_dense_models(models, smollm2, text):
    dense, moe = models
    tokens = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, logits = dense(tokens).logits, moe(tokens).logits
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_answers_alike(models, upcycled):
    tokenizer = AutoTokenizer.from_pretrained(upcycled)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    answers = [
        tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0])
        for model in models
    ]
    assert answers[0] == answers[1]
    assert "Paris" in answers[1]


def test_experts_of_two_models_are_the_plans(smollm2, perturbed_smollm2, tmp_path):
    build(smollm2, perturbed_smollm2, "-o", tmp_path / "moe", "--experts", 4)
    sources = [
        safe_open(folder / "model.safetensors", "pt") for folder in (smollm2, perturbed_smollm2)
    ]
    plan = plan_moe_construction(2, 30)
    with safe_open(tmp_path / "moe" / "model.safetensors", "pt") as moe:
        for layer in range(30):
            for expert in range(4):
                assignment = plan.assignments[layer][expert]
                source = sources[assignment.source_model]
                for name, role in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                    prefix = f"model.layers.{layer}"
                    built = moe.get_tensor(
                        f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"
                    )
                    expected = source.get_tensor(
                        f"model.layers.{assignment.source_layer}.mlp.{role}_proj.weight"
                    )
                    assert torch.equal(built.view(torch.int16), expected.view(torch.int16))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_of_the_whole_process_does_not_hold_the_model(smollm2, tmp_path):
    code = (
        "import re, sys\nfrom moe_fast.__main__ import main\n"
        f"sys.argv = ['moe-fast', 'build', {str(smollm2)!r}, '-o', {str(tmp_path / 'moe')!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(re.search('VmHWM.*', open('/proc/self/status').read())[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak_kilobytes = int(done.stdout.rpartition("VmHWM:")[2].split()[0])
    assert peak_kilobytes < 200_000
