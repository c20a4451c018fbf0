"""Merged experts are means, and what routes to them is the first expert's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for extra in ("ml_dtypes", "safetensors", "typer"):
    pytest.importorskip(extra)

import ml_dtypes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from command import run
from moe_families import NUM_EXPERTS, OPERATED_ON, write_moe
from moe_fast import CheckpointError, check_moe, merge_experts
from moe_fast.models.moe import open_moe_model
from moe_fast.storage.arithmetic import rounded
from moe_fast.storage.pieces import Overflow

GROUPS: list[Any] = [
    [[0, 3], [2], {"experts": [5, 1, 4], "weights": [0.5, 2, 1]}],
    [{"experts": [4], "weights": [3]}, [1, 0], [3, 2, 5]],
    [[5, 4], [3, 2], [1, 0]],
    [[0], [1], [2, 3, 4, 5]],
]


def merged_by_numpy(array: np.ndarray, group: Any, axis: int | None = None) -> np.ndarray:
    """The mean in float64, added in the group's order, rounded by NumPy or ml_dtypes."""
    experts = group["experts"] if isinstance(group, dict) else group
    weights = group["weights"] if isinstance(group, dict) else [1.0] * len(experts)
    total: Any = 0.0
    for expert, weight in zip(experts, weights, strict=True):
        total = total + array[expert].astype(np.float64) * weight
    return (total / sum(weights)).astype(array[0].dtype)


def first_of(group: Any) -> int:
    return (group["experts"] if isinstance(group, dict) else group)[0]


@pytest.mark.parametrize("family", OPERATED_ON)
def test_every_family_is_merged(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    layers = open_moe_model(tmp_path / "moe").layers
    groups = {layer.key: GROUPS[i] for i, layer in enumerate(layers)}
    report = merge_experts(tmp_path / "moe", tmp_path / "merged", {"layers": groups})
    assert report.num_experts == 3
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(a.nbytes for a in found.values()) < sum(a.nbytes for a in tensors.values())
    for name, array in found.items():
        match = re.search(r"layers\.(\d+)\.", name)
        here = groups.get(match[1]) if match else None
        if own := re.search(r"\.experts\.(\d+)\.", name):
            names = [name.replace(own[0], f".experts.{e}.") for e in range(NUM_EXPERTS)]
            expected = merged_by_numpy([tensors[n] for n in names], here[int(own[1])])
        elif here is None or NUM_EXPERTS not in tensors[name].shape:
            expected = tensors[name]
        elif array.ndim > 2 or (re.search(r"experts\..*_bias$", name) and "corr" not in name):
            expected = np.stack([merged_by_numpy(tensors[name], group) for group in here])
        else:
            axis = tensors[name].shape.index(NUM_EXPERTS)
            expected = np.take(tensors[name], [first_of(group) for group in here], axis)
        np.testing.assert_array_equal(array, expected, err_msg=name)
    checked = check_moe(tmp_path / "merged")
    assert checked.passed, checked.problems


DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.floats(width=64, allow_nan=False), min_size=1, max_size=50))
def test_values_are_rounded_once(dtype, values):
    array = np.array(values)
    found = rounded(array.copy(), dtype, Overflow()).view(DTYPES[dtype])
    for value, near in zip(values, found.tolist(), strict=True):
        candidates = neighbours(near, DTYPES[dtype])
        errors = [abs(exactly(value) - exactly(each)) for each in candidates]
        assert not np.isfinite(near) or abs(exactly(value) - exactly(near)) <= min(errors)


def exactly(value: float) -> Any:
    from fractions import Fraction

    return Fraction(value) if np.isfinite(value) else np.inf


def neighbours(value: float, dtype: Any) -> list[float]:
    near = np.array(value, dtype)
    with np.errstate(over="ignore", under="ignore"):
        ends = [np.nextafter(near, np.array(end, dtype)) for end in (-np.inf, np.inf)]
    return [float(each) for each in ends if np.isfinite(each)]


def test_halfway_points_in_float64_are_told_apart():
    one, step = 1.0, 2.0**-8  # half a unit in the last place of bfloat16
    values = np.array([one + step, one + step * (1 + 2.0**-40), one + step * (1 - 2.0**-40)])
    found = rounded(values, "BF16", Overflow()).view(ml_dtypes.bfloat16).astype(float)
    assert found.tolist() == [1.0, 1.0 + 2 * step, 1.0]


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    write_moe(tmp_path / "moe", "deepseek_v3")
    return tmp_path / "moe"


WRONG = [
    ([[0, 1], [1, 2, 3], [4, 5]], "groups.json: layer 2: expert 1 stands twice"),
    ([[0, 1], [2, 3]], "groups.json: layer 2: no group has expert 4-5"),
    ([[0, 1, 2, 3, 4, 5]], "layer 2 has 1 group; num_experts_per_tok is 2"),
    ([[0, 1], [2, 3], [4, 6], [5]], "expert 6 is none of the 6"),
    ([[0, 1], [], [2, 3, 4, 5]], "layer 2, group 1 must list experts, got []"),
    ([[0, 1], 7, [2, 3, 4, 5]], "layer 2, group 1 must list experts, got 7"),
    ([[0, 1], [True, 2, 3, 4, 5]], "must list numbers of experts"),
    ([[0, 1], [2, 3], [4, 5], []], "group 3 must list experts"),
    ([[0, 1], {"experts": [2, 3, 4, 5], "weights": [1]}], "4 experts need as many weights"),
    ([[0, 1], {"experts": [2, 3, 4, 5], "weights": [0, 0, 0, 0]}], "not all 0"),
    ([[0, 1], {"experts": [2, 3, 4, 5], "weights": [1, 1, 1, -1]}], "finite and at least 0"),
    ([[0, 1], {"members": [2, 3, 4, 5]}], "must have the keys 'experts' and 'weights'"),
    ("0123", "layer 2 must list groups of experts, got '0123'"),
    ([[0, 1], [2, 3], [4, 5]], "layers have 3, 6 groups; config.json of a deepseek_v3"),
]


@pytest.mark.parametrize(("groups", "message"), WRONG)
def test_wrong_groups_are_refused_and_nothing_is_written(moe, tmp_path, groups, message):
    number = 6 if "layers have" in message else len(groups)
    first = [[e] for e in range(6)] if number == 6 else [*[[e] for e in range(number - 1)]]
    if number < 6:
        first.append(list(range(number - 1, 6)))
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"layers": {"1": first, "2": groups}}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        merge_experts(moe, tmp_path / "merged", file)
    assert not (tmp_path / "merged").exists()


def test_packed_weights_have_no_mean(tmp_path):
    write_moe(tmp_path / "moe", "mixtral", ml_dtypes.float8_e4m3fn)
    groups = {"layers": {key: [[0, 1], [2, 3], [4, 5]] for key in "012"}}
    with pytest.raises(CheckpointError, match="is F8_E4M3; means are taken of F32, F16, BF16"):
        merge_experts(tmp_path / "moe", tmp_path / "no", groups)


def test_the_routers_groups_stay_whole(tmp_path):
    write_moe(tmp_path / "moe", "deepseek_v3", n_group=2, topk_group=1)
    good = {"layers": {key: [[0, 1], [2], [3, 4], [5]] for key in "12"}}
    assert merge_experts(tmp_path / "moe", tmp_path / "merged", good).num_experts == 4
    bad = {"layers": {key: [[0, 1], [3, 4], [2], [5]] for key in "12"}}
    with pytest.raises(
        CheckpointError, match="the router chooses from 2 groups of 3 experts first"
    ):
        merge_experts(tmp_path / "moe", tmp_path / "no", bad)


def test_the_command(moe, tmp_path):
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"layers": {key: [[0, 1], [2, 3], [4, 5]] for key in "12"}}))
    done = run("merge", moe, "-o", tmp_path / "merged", "--groups", file)
    assert done.returncode == 0, done.stderr
    assert "experts     6 to 3 per layer, 2 per token" in done.stdout
