"""MoE checkpoints that others made: what transformers 5 saves, checked and converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from logits import compute_logits
from moe_fast import check_moe, convert_moe, inspect_model
from moe_fast.checkpoint.check import Status
from random_models import random_model

TOKENS = np.random.default_rng(0).integers(96, size=30).tolist()
COMMON = {"num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}
QWEN2 = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
FUSABLE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": QWEN2,
    "qwen2_moe, a dense layer": QWEN2 | {"mlp_only_layers": [1]},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "flex_olmo": {"num_experts": 4},
}
OF_ONE_LAYOUT = {
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 32},
}
KNOWN = FUSABLE | OF_ONE_LAYOUT
UNKNOWN = {
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a random model of a family, made once."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            family, keys = name.partition(",")[0], COMMON | (KNOWN | UNKNOWN)[name]
            model = random_model(family, torch.bfloat16, **keys)
            made[name] = tmp_path_factory.mktemp("saved") / "model"
            model.save_pretrained(made[name])
        return made[name]

    return save


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_pass_as_far_as_they_can_be_checked(saved, name):
    report = check_moe(saved(name))
    assert report.passed, report.problems
    passed = {finding.check for finding in report.findings if finding.status is Status.PASSED}
    assert passed == {"headers", "structure", "routing", "readers"}
    assert next(r for r in report.readers if r.name == "transformers 5").loads


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_families_are_looked_into(saved, name):
    report = check_moe(saved(name))
    assert report.passed, report.problems
    assert report["structure"].summary.startswith("experts and routers fit each other; no rules")
    found = inspect_model(saved(name))
    assert (found.num_experts, found.num_experts_per_tok, found.num_moe_layers) == (4, 2, 3)
    assert all(router.coefficient_of_variation is not None for router in found.routers)
    assert found.copies == ()


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("name", KNOWN)
def test_conversions_compute_the_same(saved, tmp_path, name, layout):
    expected, _ = compute_logits(saved(name), TOKENS)
    convert_moe(
        saved(name),
        tmp_path / "out",
        layout=None if name in OF_ONE_LAYOUT else layout,
        dtype="float32" if layout == "fused" else None,
    )
    assert check_moe(tmp_path / "out").passed
    found, problems = compute_logits(tmp_path / "out", TOKENS)
    assert not problems
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_keys_of_transformers_5_come_out_in_both_spellings(saved, tmp_path):
    reasons = {reader.name: reader.reasons for reader in check_moe(saved("qwen3_moe")).readers}
    assert reasons["transformers 4"] == (
        "looks for num_experts, config.json has num_local_experts; it would take 128 experts; "
        "moe-fast convert writes both spellings",
    )
    convert_moe(saved("qwen3_moe"), tmp_path / "out")
    assert all(r.loads for r in check_moe(tmp_path / "out").readers if r.name != "llama.cpp")
