"""The reference library's own numbers, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest

from moe_fast import (
    MoeConfig,
    compute_expert_load_balance,
    compute_gate_weights,
    plan_moe_construction,
)

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    entries = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    assert entries
    return [pytest.param(e, id=" ".join(str(v) for v in list(e.values())[:3])) for e in entries]


@pytest.mark.parametrize("entry", golden("gate_weights.json"))
def test_gate_weights(entry):
    weights = compute_gate_weights(entry["hidden_dim"], entry["num_experts"], entry["init"])
    assert weights.size == entry["count"]
    digest = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()
    assert digest == entry["sha256_le_f64"]
    for index, value in entry["samples"].items():
        assert weights.flat[int(index)] == float.fromhex(value)
    assert weights.min() == float.fromhex(entry["min"])
    assert weights.max() == float.fromhex(entry["max"])


@pytest.mark.parametrize("entry", golden("plans.json"))
def test_plans(entry):
    # The configuration needs experts per token that fit; they do not enter these numbers.
    config = MoeConfig(entry["num_experts"], num_experts_per_tok=1)
    plan = plan_moe_construction(entry["num_models"], entry["num_layers"], config)
    report = plan.report(entry["hidden_dim"], entry["intermediate_dim"], entry["num_experts"])
    assert report.load_balance == float.fromhex(entry["load_balance"])
    assert report.total_params_estimate == entry["total_params_estimate"]
    assert compute_expert_load_balance(plan.assignments) == report.load_balance
