"""An expanded MoE holds copies of experts; what it is pruned back to is what it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors.numpy import load_file

from command import run
from moe_families import NUM_EXPERTS, OPERATED_ON, write_moe
from moe_fast import CheckpointError, MoeConfigError, check_moe, expand_moe, prune_moe


@pytest.mark.parametrize("family", OPERATED_ON)
def test_there_and_back_gives_the_same_bytes(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    report = expand_moe(tmp_path / "moe", tmp_path / "expanded", 3 * NUM_EXPERTS)
    assert (report.num_experts, report.num_experts_per_tok) == (18, 6)
    expanded = load_file(tmp_path / "expanded" / "model.safetensors")
    assert sum(a.nbytes for a in expanded.values()) > sum(a.nbytes for a in tensors.values())
    checked = check_moe(tmp_path / "expanded")
    assert checked.passed, checked.problems
    # Only prune by lists can undo it, for pruning leaves the experts of a token as they are.
    for first in (0, 2 * NUM_EXPERTS):
        back = tmp_path / f"back-{first}"
        prune_moe(tmp_path / "expanded", back, keep=range(first, first + NUM_EXPERTS))
        weights = [(tmp_path / n / "model.safetensors").read_bytes()[8:] for n in ("moe", back)]
        assert strip_header(weights[0]) == strip_header(weights[1])


def strip_header(data: bytes) -> tuple[dict[str, object], bytes]:
    """The header's entries in order, and the data: spaces between them may differ."""
    decoder = json.JSONDecoder()
    header, end = decoder.raw_decode(data.decode("latin-1"))
    return list(header.items()), data[end:].lstrip(b" ")


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    write_moe(tmp_path / "moe", "deepseek_v3", n_group=2, topk_group=1)
    return tmp_path / "moe"


def origins(output: Path) -> list[int]:
    return json.loads((output / "moe_fast.json").read_text())["request"]["copies"]["2"]


def test_groups_keep_their_own_copies(moe, tmp_path):
    report = expand_moe(moe, tmp_path / "expanded", 12)
    assert origins(tmp_path / "expanded") == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert "compares groups of experts by their best ones" in report.warnings[0]
    scores = {"layers": {key: {"reap": [1, 5, 2, 9, 8, 7]} for key in "12"}}
    expand_moe(moe, tmp_path / "some", 8, scores=scores)
    assert origins(tmp_path / "some") == [0, 1, 2, 1, 3, 4, 5, 3]
    with pytest.raises(MoeConfigError, match="a multiple of the 2 groups of experts, got 7"):
        expand_moe(moe, tmp_path / "no", 7, scores=scores)


def test_what_is_not_exact_is_said(tmp_path):
    write_moe(tmp_path / "moe", "mixtral")
    scores = {"layers": {key: {"reap": [1, 5, 2, 9, 8, 7]} for key in "012"}}
    cases = {
        "a token still goes to 2 experts": (12, {"keep_k": True}),
        "8 experts are not a multiple of 6": (8, {"scores": scores}),
    }
    for warning, (number, options) in cases.items():
        report = expand_moe(tmp_path / "moe", tmp_path / warning, number, **options)
        assert report.num_experts_per_tok == 2
        assert report.warnings[0].startswith(warning)
        assert report.warnings[0].endswith("does not compute what the model computes")
        assert check_moe(tmp_path / warning).passed
    report = expand_moe(tmp_path / "moe", tmp_path / "exact", 12)
    assert report.warnings == ()


def test_wrong_numbers_are_refused(tmp_path):
    write_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(MoeConfigError, match="num_experts must be at least 6, got 5"):
        expand_moe(tmp_path / "moe", tmp_path / "no", 5)
    with pytest.raises(MoeConfigError, match="num_experts must be at most 65536, got 6000000000"):
        expand_moe(tmp_path / "moe", tmp_path / "no", 6 * 10**9)
    with pytest.raises(MoeConfigError, match="a multiple of the 6 experts, got 8; for another"):
        expand_moe(tmp_path / "moe", tmp_path / "no", 8)
    with pytest.raises(MoeConfigError, match="scores are for a number of experts"):
        expand_moe(tmp_path / "moe", tmp_path / "no", 12, scores={"layers": {}})
    with pytest.raises(CheckpointError, match="layer 0 is missing"):
        expand_moe(tmp_path / "moe", tmp_path / "no", 8, scores={"layers": {}})
    assert not (tmp_path / "no").exists()


def test_a_manifest_with_other_copies_fails_its_check(tmp_path):
    write_moe(tmp_path / "moe", "mixtral")
    expand_moe(tmp_path / "moe", tmp_path / "expanded", 12)
    file = tmp_path / "expanded" / "moe_fast.json"
    manifest = json.loads(file.read_text())
    manifest["request"]["copies"]["1"][7] = 0
    file.write_text(json.dumps(manifest))
    problems = check_moe(tmp_path / "expanded")["experts"].problems
    assert any("layers.1.block_sparse_moe.experts.7.w1.weight' differs" in p for p in problems)
    manifest["request"]["copies"]["1"][7] = 9
    file.write_text(json.dumps(manifest))
    summary = check_moe(tmp_path / "expanded")["experts"].summary
    assert "copies: layer 1: expert 9 is none of the 6" in summary


def test_the_command(tmp_path):
    write_moe(tmp_path / "moe", "mixtral", np.float16)
    done = run("expand", tmp_path / "moe", "-o", tmp_path / "out", "--experts", "12")
    assert done.returncode == 0, done.stderr
    assert "experts     6 to 12 per layer, 2 to 4 per token" in done.stdout
    done = run("expand", tmp_path / "moe", "-o", tmp_path / "no", "--experts", "5", "--json")
    assert done.returncode == 2
    assert "--experts must be at least 6, got 5" in done.stderr


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "nemotron_h"])
def test_copies_get_noise_of_their_own(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    given = {"noise_scale": 0.25, "seed": 3}
    report = expand_moe(tmp_path / "moe", tmp_path / "noisy", 3 * NUM_EXPERTS, **given)
    assert "copies have noise of 0.25" in report.warnings[-1]
    expand_moe(tmp_path / "moe", tmp_path / "plain", 3 * NUM_EXPERTS)
    noisy, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("noisy", "plain"))
    assert noisy.keys() == plain.keys()
    drawn = []
    for name, array in plain.items():
        difference = noisy[name] - array
        if array.shape[:1] == (3 * NUM_EXPERTS,) and array.ndim == 3:  # those of a layer together
            assert not difference[:NUM_EXPERTS].any()
            drawn += [*difference[NUM_EXPERTS:]]
        elif (own := re.search(r"\.experts\.(\d+)\.", name)) and int(own[1]) >= NUM_EXPERTS:
            drawn.append(difference)
        else:
            np.testing.assert_array_equal(noisy[name], array, err_msg=name)
    values = np.concatenate([each.ravel() for each in drawn])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() / 0.25 - 1) < 0.01
    first = [each.ravel()[:4].tobytes() for each in drawn]
    assert len(set(first)) == len(first)
    assert check_moe(tmp_path / "noisy").passed
    expand_moe(tmp_path / "moe", tmp_path / "again", 3 * NUM_EXPERTS, **given, max_shard_size="9kB")
    again: dict[str, np.ndarray] = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        again |= load_file(file)
    for name, array in noisy.items():
        np.testing.assert_array_equal(again[name], array)
    assert len(tensors) <= len(again)


@pytest.mark.parametrize("noise", [-1, float("nan"), float("inf")])
def test_noise_that_is_none(moe, tmp_path, noise):
    with pytest.raises(MoeConfigError, match="noise_scale must be a finite number, at least 0"):
        expand_moe(moe, tmp_path / "expanded", 12, noise_scale=noise)
