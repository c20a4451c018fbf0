"""Statistics, losses and capacity planning against their definitions, at every SIMD level."""

import copy
import importlib.util
import math
import pickle
import sys
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import (
    MoeConfig,
    MoeConfigError,
    Router,
    RoutingError,
    RoutingStats,
    kernels,
    plan_capacity,
    route,
    update_selection_bias,
)
from moe_fast.kernels.level import load
from moe_fast.routing import choose, statistics
from reference import routing as reference

DTYPES = ["float32", "float64", "bfloat16", "float16"]
if importlib.util.find_spec("ml_dtypes") is None:
    DTYPES.remove("bfloat16")

pytestmark = pytest.mark.usefixtures("level")

METHODS = ["top_k", "switch_transformer", "expert_choice"]


def config(num_experts, k=1, method="top_k"):
    return MoeConfig(num_experts=num_experts, num_experts_per_tok=k, routing_method=method)


@pytest.fixture(scope="module")
def small_pieces():
    """Even the smallest batch comes in pieces, each shared among threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LOGITS_AT_A_TIME", 64)
        patch.setattr(statistics, "TOKENS_AT_A_TIME", 7)
        patch.setattr(choose, "LOGITS_PER_THREAD", 0)
        yield


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    z = rng.standard_normal(shape) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    z[rng.random(shape) < draw(st.sampled_from([0.0, 0.2]))] = -np.inf
    z[:, 0] = np.maximum(z[:, 0], -50)
    dtype = draw(st.sampled_from(DTYPES))
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return z.astype(dtype)


@given(
    logits=batches(),
    data=st.data(),
    method=st.sampled_from(METHODS),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    threads=st.integers(1, 3),
)
def test_equals_the_definitions(small_pieces, logits, data, method, scores, threads):
    num_tokens, num_experts = logits.shape
    k = 1 if method == "switch_transformer" else data.draw(st.integers(1, num_experts))
    factor = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    options = {"scores": scores, "capacity_factor": factor, "routed_scaling_factor": 2.5}
    factors = [0.0, 0.7, 1.0, math.inf]
    moe = config(num_experts, k, method)
    stats = RoutingStats(moe, capacity_factors=factors, **options)
    stats.update(logits, threads=threads)

    free = route(logits, moe, **{**options, "capacity_factor": math.inf})
    routed = route(logits, moe, **options)
    counts = routed.tokens_per_expert_before_drop
    if method == "expert_choice":
        free = routed
        importance = routed.weights.astype(np.float64).sum(axis=1)
    else:
        dropped = reference.dropped_by_capacity(free.expert_indices, num_experts, factors[:-1])
        expected = np.array([*dropped, 0]) / counts.sum()
        np.testing.assert_array_equal(stats.share_dropped_by_capacity_factor[0], expected)
        importance = np.bincount(
            free.expert_indices.ravel(), free.weights.ravel().astype(np.float64), num_experts
        )
    np.testing.assert_array_equal(stats.counts[0], counts)
    np.testing.assert_allclose(stats.importance[0], importance, atol=1e-7)
    assert stats.num_tokens.tolist() == [num_tokens]
    assert stats.num_dropped.tolist() == [routed.num_dropped]
    assert stats.num_unrouted.tolist() == [routed.num_unrouted]
    assert stats.share_unrouted[0] == routed.num_unrouted / num_tokens

    p = reference.probabilities(logits, scores)
    np.testing.assert_allclose(stats.mean_probabilities[0], p.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(
        stats.mean_entropy[0], reference.entropy(p).mean(), rtol=1e-5, atol=1e-6
    )
    z = reference.log_sum_exp(logits)
    np.testing.assert_allclose(stats.z_loss(0.5)[0], 0.5 * (z**2).mean(), rtol=1e-6, atol=1e-6)
    if counts.sum() == num_tokens * k:
        expected = reference.switch_loss(counts, p, k, 0.01)
        np.testing.assert_allclose(stats.load_balancing_loss(0.01)[0], expected, rtol=1e-5)
    if counts.sum():
        variation = counts.std() / counts.mean()
        np.testing.assert_allclose(stats.coefficient_of_variation[0], variation, atol=1e-14)
        if importance.mean() > 0.01:  # it is kept in units of 2^-32
            loss = 3 * (importance.std() / importance.mean()) ** 2
            np.testing.assert_allclose(stats.importance_loss(3)[0], loss, rtol=1e-5, atol=1e-6)


@given(logits=batches(), data=st.data())
def test_splitting_and_merging_change_nothing(level, logits, data):
    moe = config(logits.shape[1], 1)
    whole = RoutingStats(moe, 2)
    whole.update(logits, layer=1)
    cuts = data.draw(st.lists(st.integers(0, len(logits)), max_size=4).map(sorted))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(logits)], strict=True):
        parts.append(RoutingStats(moe, 2))
        parts[-1].update(logits[start:stop], layer=1)
    parts = data.draw(st.permutations(parts))
    assert sum(parts) == whole
    assert reduce(lambda a, b: b + a, parts) == whole
    assert pickle.loads(pickle.dumps(whole)) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", load("baseline"))
        other = RoutingStats(moe, 2)
        other.update(logits, layer=1)
        assert other == whole
    assert whole + copy.deepcopy(whole) != whole


def test_adding_leaves_the_summands_alone():
    one = RoutingStats(config(4))
    one.update(np.eye(4))
    two = one + one
    assert one.num_tokens.tolist() == [4]
    assert two.num_tokens.tolist() == [8]
    one += two
    assert one.num_tokens.tolist() == [12]


def test_capacity_is_that_of_a_batch():
    logits = np.repeat(np.eye(2), 4, axis=0)  # four tokens to expert 0, then four to expert 1
    switch = config(2, 1, "switch_transformer")
    for size, share in [(None, 0.0), (8, 0.0), (4, 0.25), (3, 0.0), (2, 0.0)]:
        stats = RoutingStats(switch, capacity_factors=[1.0], capacity_factor=1.5)
        stats.update(logits, tokens_per_batch=size)
        batches = [logits[i : i + (size or 8)] for i in range(0, 8, size or 8)]
        dropped = sum(route(b, switch, capacity_factor=1.5).num_dropped for b in batches)
        assert stats.num_dropped.tolist() == [dropped]
        assert stats.share_dropped[0] == share == dropped / 8
    np.testing.assert_array_equal(plan_capacity(logits, [1.0, 1.5, 2.0], switch), [0, 0, 0])
    planned = plan_capacity(logits, [1.0, 1.5, 2.0], switch, tokens_per_batch=4)
    np.testing.assert_array_equal(planned, [0.5, 0.25, 0.0])


def test_capacity_from_statistics_pools_a_layer():
    stats = RoutingStats(config(2), 2)
    stats.update(np.tile([1.0, 0.0], (8, 1)))
    stats.update(np.repeat(np.eye(2), 4, axis=0), layer=1)
    np.testing.assert_array_equal(plan_capacity(stats, [1.0, 1.5, 2.0]), [[0.5, 0.25, 0], [0] * 3])


def test_losses_of_an_even_router():
    stats = RoutingStats(config(4, 2), 3)
    for layer in range(3):
        stats.update(np.tile([[1.0, 1, 0, 0], [0, 0, 1, 1]], (8, 1)), layer)
    np.testing.assert_allclose(stats.load_balancing_loss(0.01), [0.01] * 3, rtol=1e-9)
    assert stats.huggingface_load_balancing_loss(0.01) == pytest.approx(0.02, rel=1e-9)
    np.testing.assert_array_equal(stats.coefficient_of_variation, [0] * 3)
    np.testing.assert_allclose(stats.importance_loss(), [0] * 3, atol=1e-15)
    np.testing.assert_allclose(stats.effective_num_experts, [4] * 3)


def test_equals_transformers_loss():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = np.random.default_rng(0).standard_normal((3, 500, 8)).astype(np.float32) * 2
    stats = RoutingStats(config(8, 2), 3)
    for layer, logits in enumerate(layers):
        stats.update(logits, layer)
    expected = mixtral.load_balancing_loss_func(tuple(torch.from_numpy(layers)), 8, 2)
    assert stats.huggingface_load_balancing_loss() == pytest.approx(float(expected), rel=1e-6)


def test_z_loss_is_infinite_where_logits_are():
    stats = RoutingStats(config(2))
    stats.update(np.array([[0.0, np.inf]]))
    assert stats.z_loss().tolist() == [math.inf]
    stats.update(np.array([[0.0, 1.0]]))
    assert stats.z_loss().tolist() == [math.inf]
    stats = RoutingStats(config(2))
    stats.update(np.array([[60000.0, 0.0]]))
    assert stats.z_loss().tolist() == [60000.0**2]


def test_nothing_is_nan_until_added():
    stats = RoutingStats(config(2), 2)
    stats.update(np.eye(2), 1)
    for name in ("load", "mean_probabilities"):
        assert np.isnan(getattr(stats, name)[0]).all()
        np.testing.assert_allclose(getattr(stats, name)[1], [0.5, 0.5])
    assert np.isnan(stats.coefficient_of_variation[0])
    assert stats.describe().splitlines()[0] == "layer 0: no tokens yet"


def one_hot(choices, num_experts):
    return np.eye(num_experts)[choices] * 5


@pytest.mark.parametrize(
    ("logits", "k", "state", "experts", "words"),
    [
        (one_hot([0, 1, 2, 3] * 4, 4), 1, "even load 0.00", "4.0", ""),
        (one_hot([0, 1], 2), 2, "even load 0.00", "2.0", ""),
        (one_hot([0] * 5 + [1] * 4, 2), 1, "even load 0.11", "2.0", ""),
        (one_hot([0] * 3 + [1], 2), 1, "no expert starves or dominates 0.50", "1.8", ""),
        (
            one_hot([2] * 16, 4), 1, "uneven load 1.73", "1.0",
            "; expert 2 dominates with 100.0 % of the load"
            "; experts 0, 1, 3 starve with 0.0 % of the load",
        ),
        (
            one_hot([0] * 9 + [1], 2), 1, "uneven load 0.80", "1.4",
            "; expert 0 dominates with 90.0 % of the load"
            "; expert 1 starves with 10.0 % of the load",
        ),
        (
            one_hot([0] * 8, 8), 1, "uneven load 2.65", "1.0",
            "; expert 0 dominates with 100.0 % of the load"
            "; 7 experts (1, 2, 3, 4, ...) starve with 0.0 % of the load",
        ),
    ],
)  # fmt: skip
def test_collapse_in_words(logits, k, state, experts, words):
    stats = RoutingStats(config(logits.shape[1], k))
    stats.update(logits)
    evenness, variation = state.rsplit(maxsplit=1)
    assert stats.describe() == (
        f"layer 0: {evenness} (coefficient of variation {variation}, "
        f"{experts} effective experts of {logits.shape[1]}){words}"
    )


def test_drops_in_words():
    stats = RoutingStats(config(2, 1, "switch_transformer"), capacity_factor=1.0)
    stats.update(one_hot([0, 0, 0, 1], 2))
    assert stats.describe().endswith("; 25.0 % of the choices dropped")
    assert repr(stats) == (
        "RoutingStats(method='switch_transformer', num_layers=1, num_experts=2, "
        "num_experts_per_tok=1, num_tokens=[4])"
    )


def test_an_error_adds_nothing():
    stats = RoutingStats(config(4))
    logits = np.zeros((1000, 4))
    logits[700, 2] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LOGITS_AT_A_TIME", 64)
        with pytest.raises(RoutingError, match=r"^logits of token 700 hold a NaN$"):
            stats.update(logits)
    assert stats == RoutingStats(config(4))


def test_selection_bias_is_raised_where_load_is_low():
    bias = np.zeros(8)
    logits = np.random.default_rng(1).standard_normal((2000, 8)) + np.linspace(0, 2, 8)
    before = route(logits, config(8, 2), scores="sigmoid").tokens_per_expert
    for _ in range(300):
        counts = route(logits, config(8, 2), scores="sigmoid", selection_bias=bias)
        bias = update_selection_bias(bias, counts.tokens_per_expert_before_drop)
    after = route(logits, config(8, 2), scores="sigmoid", selection_bias=bias).tokens_per_expert
    assert after.std() < 0.1 * before.std()


@pytest.mark.parametrize("method", METHODS)
def test_a_router_in_place_of_its_configuration(method):
    logits = np.random.default_rng(2).standard_normal((200, 8))
    options = {"scores": "sigmoid", "capacity_factor": 1.0}
    router = Router(config(8, 1, method), **options)
    stats = RoutingStats(router, capacity_factors=[1.0])
    stats.update(logits)
    expected = RoutingStats(config(8, 1, method), capacity_factors=[1.0], **options)
    expected.update(logits)
    assert stats == expected
    assert (stats + expected).num_tokens.tolist() == [400]
    assert RoutingStats.from_dict(stats.to_dict()) == stats
    assert stats.router is router
    if method != "expert_choice":
        planned = plan_capacity(logits, [0.5, 1.0], router)
        expected = plan_capacity(logits, [0.5, 1.0], config(8, 1, method), **options)
        np.testing.assert_array_equal(planned, expected)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_taken_as_they_are(method, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits.requires_grad_()
    same = logits.detach().float().numpy()
    moe = config(8, 1, method)
    stats, expected = RoutingStats(moe), RoutingStats(moe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LOGITS_AT_A_TIME", 64)
        stats.update(logits, tokens_per_batch=100)
    expected.update(same, tokens_per_batch=100)
    assert stats == expected
    if method != "expert_choice":
        planned = plan_capacity(logits, [0.5, 1.0], moe)
        np.testing.assert_array_equal(planned, plan_capacity(same, [0.5, 1.0], moe))
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 8).bfloat16())
    counts = torch.from_numpy(stats.counts[0])
    np.testing.assert_array_equal(
        update_selection_bias(bias, counts),
        update_selection_bias(bias.detach().float().numpy(), stats.counts[0]),
    )
    with pytest.raises(RoutingError, match=r"tokens_per_expert must be on the CPU.*expert.cpu\(\)"):
        update_selection_bias(bias, counts.to("meta"))


STATS = RoutingStats(config(4))
CHOICE = config(4, 1, "expert_choice")
LOGITS = np.zeros((1, 4))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "config must be a MoeConfig", lambda: RoutingStats(4)),
        (MoeConfigError, "num_layers must be at least 1", lambda: RoutingStats(config(4), 0)),
        (MoeConfigError, "scores must be", lambda: RoutingStats(config(4), scores="none")),
        (
            TypeError,
            "unexpected keyword argument 'score'",
            lambda: RoutingStats(config(4), score=1),
        ),
        (
            MoeConfigError,
            "selection_bias must have the shape",
            lambda: RoutingStats(config(4), selection_bias=[1]),
        ),
        (
            MoeConfigError,
            "capacity_factors must be at least 0, got -1",
            lambda: RoutingStats(config(4), capacity_factors=[-1]),
        ),
        (
            MoeConfigError,
            r"layer must be below 1, the number of layers, got 1",
            lambda: STATS.update(LOGITS, 1),
        ),
        (RoutingError, "logits must have the shape", lambda: STATS.update(np.zeros((1, 5)))),
        (RoutingError, r"\(2, 3, 4\) .* several layers", lambda: STATS.update(np.zeros((2, 3, 4)))),
        (
            MoeConfigError,
            "tokens_per_batch must be at least 1, got 0",
            lambda: STATS.update(LOGITS, tokens_per_batch=0),
        ),
        (MoeConfigError, "only be added where config", lambda: STATS + RoutingStats(config(5))),
        (MoeConfigError, "only be added where config", lambda: STATS + RoutingStats(config(4), 2)),
        (
            MoeConfigError,
            "only be added where config",
            lambda: STATS + RoutingStats(config(4), selection_bias=[0] * 4),
        ),
        (
            MoeConfigError,
            r"scores is an option of the router .* use router.replace\(scores=...\)",
            lambda: RoutingStats(Router(config(4)), scores="sigmoid"),
        ),
        (
            MoeConfigError,
            "scores is an option of the router",
            lambda: plan_capacity(LOGITS, [1.0], Router(config(4)), scores="sigmoid"),
        ),
        (TypeError, "unsupported operand", lambda: STATS + 1),
        (TypeError, "config must be a MoeConfig, got None", lambda: plan_capacity(LOGITS, [1.0])),
        (
            MoeConfigError,
            "expert_choice drops nothing",
            lambda: plan_capacity(LOGITS, [1.0], CHOICE),
        ),
        (
            MoeConfigError,
            "statistics have their own",
            lambda: plan_capacity(STATS, [1.0], config(4)),
        ),
        (MoeConfigError, "must both have the shape", lambda: update_selection_bias([0.0], [1, 2])),
        (
            TypeError,
            "update_rate must be a number",
            lambda: update_selection_bias([0.0], [1], "fast"),
        ),
        (
            MoeConfigError,
            "update_rate must be at least 0 and finite, got -1.0",
            lambda: update_selection_bias([0.0], [1], -1),
        ),
        (
            TypeError,
            "selection_bias must be numbers, got the dtype <U1",
            lambda: update_selection_bias(["a"], [1]),
        ),
    ],
    ids=lambda value: None,
)
def test_bad_arguments_are_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
