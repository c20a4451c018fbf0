"""Predicted loads, against a count by hand, and what is said of routers that starve experts."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from command import run
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    RoutingError,
    build_moe,
    inspect_model,
    predict_load,
)
from moe_fast.demo import make_dense_model
from moe_fast.routing import health
from moe_fast.routing.health import RANDOM_TOKENS
from moe_fast.storage.npy import map_npy
from reference import normal as reference

RNG = np.random.default_rng(0)


def counts_by_hand(router, hidden_states, k):
    """How often each expert is among the k largest logits."""
    logits = hidden_states @ router.T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.bincount(chosen.ravel(), minlength=len(router))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_given_hidden_states_are_routed(k):
    routers = RNG.normal(size=(3, 5, 16)).astype(np.float32)
    same = RNG.normal(size=(200, 16)).astype(np.float32)
    own = RNG.normal(size=(3, 200, 16)).astype(np.float32)
    stats = predict_load(routers, same, num_experts_per_tok=k)
    assert [row.tolist() for row in stats.counts] == [
        counts_by_hand(router, same, k).tolist() for router in routers
    ]
    stats = predict_load(routers, own, num_experts_per_tok=k)
    assert [row.tolist() for row in stats.counts] == [
        counts_by_hand(router, states, k).tolist()
        for router, states in zip(routers, own, strict=True)
    ]


def test_random_tokens_are_standard_normal_where_a_router_looks():
    """Hidden states that fit the logits: normal in every direction that the router sees."""
    router = RNG.normal(size=(4, 64)).astype(np.float32)
    draws = [reference.normal(0, i) for i in range(RANDOM_TOKENS * 4)]
    normal = np.array(draws, np.float32).reshape(RANDOM_TOKENS, 4)
    weights = router.astype(np.float64)
    directions = np.linalg.inv(np.linalg.cholesky(weights @ weights.T)) @ weights
    np.testing.assert_allclose(directions @ directions.T, np.eye(4), atol=1e-12)
    hidden = normal @ directions
    counts = predict_load([router]).counts[0]
    assert counts.tolist() == counts_by_hand(router, hidden, 2).tolist()


def test_random_tokens_spread_as_drawn_ones_do():
    router = RNG.normal(size=(6, 32)).astype(np.float32) * np.linspace(0.5, 2, 6)[:, np.newaxis]
    hidden = RNG.normal(size=(100_000, 32))
    drawn = counts_by_hand(router, hidden, 2) / len(hidden)
    load = predict_load([router]).counts[0] / RANDOM_TOKENS
    deviation = np.sqrt(drawn * (1 - drawn) / RANDOM_TOKENS)
    assert (np.abs(load - drawn) < 5 * deviation).all()


@pytest.mark.parametrize("num_experts", [2, 40])
def test_rows_that_depend_on_each_other(num_experts):
    rows = RNG.normal(size=(num_experts, 8)).astype(np.float32)
    rows[-1] = rows[:-1].mean(axis=0) * 2
    assert predict_load([rows, rows * 0]).counts.sum(axis=1).tolist() == [2 * RANDOM_TOKENS] * 2


def test_equal_rows_tie_and_the_lower_index_wins():
    rows = RNG.normal(size=(40, 512)).astype(np.float32)
    router = rows[[*range(40), *range(40)]]
    counts = predict_load([router], num_experts_per_tok=1).counts[0]
    assert counts[:40].min() > 0
    assert counts[40:].max() == 0


def test_tensors_are_taken_as_they_are(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    generator = torch.Generator().manual_seed(0)
    routers = torch.randn(3, 5, 16, generator=generator).bfloat16()
    states = torch.randn(3, 40, 16, generator=generator).bfloat16()
    layers = [torch.nn.Parameter(router) for router in routers]
    for hidden_states in (states, states[0], None):
        same = None if hidden_states is None else hidden_states.float().numpy()
        expected = predict_load(routers.float().numpy(), same)
        assert predict_load(routers, hidden_states) == expected
        assert predict_load(layers, hidden_states) == expected
    with pytest.raises(RoutingError, match=r"^hidden_states must be on the CPU.*states.cpu\(\)$"):
        predict_load(routers, states.to("meta"))
    with pytest.raises(MoeConfigError, match=r"^routers must be tensors of one shape, got"):
        predict_load([layers[0], layers[1][:4]])


@pytest.mark.parametrize(
    ("routers", "hidden_states", "message"),
    [
        (np.zeros((4, 8)), None, r"^routers must have the shape \(L, E, H\), got \(4, 8\)$"),
        (np.zeros((2, 4, 8)), np.zeros((5, 7)), r"shape \(T, 8\) or \(2, T, 8\), got \(5, 7\)$"),
        (np.zeros((2, 4, 8)), np.zeros((3, 5, 8)), r"or \(2, T, 8\), got \(3, 5, 8\)$"),
        (np.zeros((2, 4, 8)), np.zeros((0, 8)), r"^hidden_states hold no token: .* \(0, 8\)$"),
        (np.zeros((2, 4, 8)), np.zeros((5, 8), complex), r"hold real numbers, got dtype complex"),
        (np.zeros((2, 4, 8)), np.full((5, 8), np.nan), r"finite.* from 0 to 4 read in layer 0 is"),
        (np.zeros((2, 4, 8)), np.zeros(8), r"or \(2, T, 8\), got \(8,\)$"),
        (np.zeros((2, 1, 8)), None, r"^num_experts_per_tok must be at most"),
        (np.full((2, 4, 8), np.inf), None, r"^routers must be finite in float32$"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(routers, hidden_states, message):
    with pytest.raises(MoeConfigError, match=message):
        predict_load(routers, hidden_states)


@pytest.fixture
def dense(tmp_path):
    pytest.importorskip("safetensors")
    make_dense_model(tmp_path / "dense", seed=0, num_hidden_layers=4)
    return tmp_path / "dense"


def warnings_of(dense, tmp_path, models=None, num_experts=4, **options):
    report = build_moe(models or dense, tmp_path / "moe", MoeConfig(num_experts, 1), **options)
    assert report.routers.warnings == report.warnings
    return report.warnings


@pytest.mark.parametrize(
    "options",
    [
        {"routers": "balanced"},
        {"routers": "random"},
        {"routers": "normal"},
        {"routers": "linear"},
    ],
    ids=str,
)
def test_usual_routers_are_healthy(dense, tmp_path, options):
    assert warnings_of(dense, tmp_path, **options) == ()


def test_the_report_has_the_prediction(dense, tmp_path):
    health = build_moe(dense, tmp_path / "moe", MoeConfig(4, 1)).routers
    assert health.hidden_states == "random tokens"
    assert health.num_tokens == 1024
    assert len(health.coefficient_of_variation) == len(health.mean_entropy) == 4
    assert max(health.coefficient_of_variation) < 0.2
    assert 0.3 < min(health.mean_entropy) < max(health.mean_entropy) < 0.7  # rather decided
    health = build_moe(dense, tmp_path / "even", MoeConfig(4, 1), routers="balanced")
    assert min(health.routers.mean_entropy) == pytest.approx(np.log(4), abs=1e-3)


@pytest.mark.parametrize("layers", [(), (4,)], ids=["the same", "each layer's own"])
def test_given_hidden_states_are_what_is_predicted_on(dense, tmp_path, layers):
    from safetensors.numpy import load_file

    build_moe(dense, tmp_path / "before", MoeConfig(4, 1))
    tensors = load_file(tmp_path / "before" / "model.safetensors")
    routers = np.stack(
        [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(4)]
    )
    states = RNG.normal(size=(*layers, 500, 64)) * np.linspace(0, 3, 64)
    two_best = np.sort(states @ routers.swapaxes(1, 2), axis=2)[..., -2:]
    clear = np.diff(two_best)[..., 0] > 1e-5  # whatever the rounding of a sum in float32
    states = states[..., clear.all(axis=0), :][..., :300, :]
    report = build_moe(dense, tmp_path / "moe", MoeConfig(4, 1), hidden_states=states)
    pairs = zip(routers, np.broadcast_to(states, (4, 300, 64)), strict=True)
    loads = [counts_by_hand(router, tokens, 1) for router, tokens in pairs]
    expected = [load.std() / load.mean() for load in loads]
    assert (report.routers.hidden_states, report.routers.num_tokens) == ("given tokens", 300)
    np.testing.assert_allclose(report.routers.coefficient_of_variation, expected, rtol=1e-12)
    found = inspect_model(tmp_path / "moe", hidden_states=states)
    assert found.hidden_states == "given tokens"
    variations = [router.coefficient_of_variation for router in found.routers]
    np.testing.assert_allclose(variations, expected, rtol=1e-12)


def test_experts_that_given_tokens_starve_are_told(dense, tmp_path):
    states = np.tile(RNG.normal(size=64), (50, 1))
    warnings = warnings_of(dense, tmp_path, hidden_states=states)
    assert len(warnings) > 0
    for warning in warnings:
        assert "would get less than a quarter of an even load of 50 given tokens; bal" in warning


def test_hidden_states_that_do_not_fit_write_nothing(dense, tmp_path):
    with pytest.raises(MoeConfigError, match=r"^hidden_states must have the shape \(T, 64\) or"):
        build_moe(dense, tmp_path / "moe", hidden_states=np.zeros((5, 63)))
    assert not (tmp_path / "moe").exists()


def test_a_file_of_hidden_states(dense, tmp_path):
    pytest.importorskip("typer")
    np.save(tmp_path / "states.npy", RNG.normal(size=(200, 64)).astype(np.float32))
    assert isinstance(map_npy(tmp_path / "states.npy"), np.memmap)
    build = ["build", dense, "-o", tmp_path / "moe", "--hidden-states", tmp_path / "states.npy"]
    done = run(*build)
    assert done.returncode == 0, done.stderr
    assert "predicted on 200 given tokens" in done.stdout
    found = run("inspect", tmp_path / "moe", "--hidden-states", tmp_path / "states.npy").stdout
    assert "predicted on given tokens" in found
    done = run(*build[:-1], tmp_path / "absent.npy", "--overwrite")
    assert done.returncode == 1
    assert "absent.npy: cannot be read as a .npy file: No such file" in done.stderr


def objects(file):
    np.save(file, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda file: file.write_bytes(b"\x80\x04N."), "it does not begin as one"),
        (lambda file: file.write_bytes(b"PK\x03\x04"), "it does not begin as one"),
        (lambda file: file.write_bytes(b"\x93NUMPY\x01\x00"), r""),
        (objects, "Array can't be memory-mapped: Python objects"),
    ],
    ids=["pickle", "archive", "truncated", "objects"],
)
def test_a_file_that_is_no_array_is_refused(tmp_path, write, reason):
    write(tmp_path / "states.npy")
    with pytest.raises(CheckpointError, match=rf"states\.npy: cannot be read as .*: {reason}"):
        map_npy(tmp_path / "states.npy")


def test_a_large_array_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    routers = RNG.normal(size=(2, 5, 16)).astype(np.float32)
    states = RNG.normal(size=(100, 16)).astype(np.float32)
    expected = predict_load(routers, states).counts
    monkeypatch.setattr(health, "NUMBERS_AT_A_TIME", 7 * 16)
    stats = predict_load(routers, states)
    assert stats.counts.tolist() == expected.tolist()
    assert stats.num_tokens.tolist() == [100, 100]
    states[50] = np.inf
    with pytest.raises(MoeConfigError, match="a token from 49 to 55 read in layer 0 is not"):
        predict_load(routers, states)


def test_uniform_routers_tie(dense, tmp_path):
    assert warnings_of(dense, tmp_path, routers="uniform") == (
        "layers 0-3: the router weights of experts 0-3 are equal, so their logits tie; "
        "choose other routers, such as auto or random",
    )


def test_prompts_in_turn_tie(dense, tmp_path):
    pytest.importorskip("tokenizers")
    models = [ExpertSource(dense, positive_prompts=[text]) for text in ("Hello", "print(x)")]
    assert warnings_of(dense, tmp_path, models, routers="cheap_embed") == (
        "layers 0-3: the router weights of experts 0-3 are equal, so their logits tie; "
        "give experts prompts that differ more, and more of them",
    )


def test_an_expert_between_two_others_starves(dense, tmp_path):
    pytest.importorskip("tokenizers")
    one, other = "same text a", "same text b"
    prompts = ([one], [other], [one, other])
    models = [ExpertSource(dense, positive_prompts=texts) for texts in prompts]
    warnings = warnings_of(dense, tmp_path, models, num_experts=3, routers="cheap_embed")
    assert warnings == (
        "layers 0-3: expert 2 would get less than a quarter of an even load of 1024 random "
        "tokens; give experts prompts that differ more, and more of them",
    )
