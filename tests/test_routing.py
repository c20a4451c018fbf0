"""Routing: every method at every SIMD level against the plain twin."""

import importlib.util
import math
import pickle
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import MoeConfig, MoeConfigError, Router, Routing, RoutingError, kernels, route
from moe_fast.kernels.level import load
from moe_fast.routing import choose
from moe_fast.routing.arrays import BFLOAT16_BITS
from reference import routing as reference

DTYPES = ["float32", "float64", "bfloat16", "float16"]
if importlib.util.find_spec("ml_dtypes") is None:
    DTYPES.remove("bfloat16")
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}

pytestmark = pytest.mark.usefixtures("level")


@pytest.fixture(scope="module")
def shared_out():
    """Even the smallest batch goes to several threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "LOGITS_PER_THREAD", 0)
        yield


def config(num_experts, k=1, method="top_k"):
    return MoeConfig(num_experts=num_experts, num_experts_per_tok=k, routing_method=method)


def weight_error(logits, dtype, num_added=None):
    """The bound that docs/routing.md states, for each logit of a row.

    `num_added` is k where the chosen are added up one after another, to renormalise.
    """
    z = logits.astype(np.float64)
    top = z.max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        below = np.where(np.isfinite(z) & np.isfinite(top), top - z, 0.0)
    # Nothing below this exponent is left to be wrong about but the smallest normal number.
    below = np.minimum(below, -math.log(SMALLEST[dtype]))
    num_added = logits.shape[1] / 16 if num_added is None else num_added
    return (below + num_added + 12) * EPSILON[dtype]


def assert_close(weights, expected, error, scale=1.0):
    """Within a relative error, and what lies below the smallest normal number, times `scale`."""
    allowed = error * expected + 2 * scale * SMALLEST[weights.dtype.name]
    assert (np.abs(weights - expected) <= allowed).all()


def seeded(seed):
    return np.random.default_rng(seed)


@st.composite
def logit_arrays(draw, most_experts=70, most_tokens=40):
    """Logits spread, tied, quantised, extreme and infinite, of every dtype and stride."""
    num_tokens = draw(st.integers(0, most_tokens))
    num_experts = draw(st.integers(1, most_experts) | st.sampled_from([8, 16, 32, 64]))
    dtype = draw(st.sampled_from(DTYPES))
    rng = seeded(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "quantised", "equal", "wide", "infinite", "denormal"]))
    z = rng.standard_normal((num_tokens, num_experts)) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    if kind == "quantised":
        z = np.round(z * 2) / 2
    elif kind == "equal":
        z[:] = 0.25
    elif kind == "wide":
        z *= 3000.0
    elif kind == "infinite":
        z[rng.random(z.shape) < 0.3] = np.inf
        z[rng.random(z.shape) < 0.5] = -np.inf
        z[rng.random(num_tokens) < 0.3] = -np.inf
    elif kind == "denormal":
        z *= {"float64": 1e-310, "float16": 1e-6}.get(dtype, 1e-40)
    with np.errstate(over="ignore"):
        z = z.astype(reference_dtype(dtype))
    layout = draw(st.sampled_from(["contiguous", "padded", "reversed", "every other", "fortran"]))
    if layout == "padded":
        wide = np.full((num_tokens, num_experts + 5), np.nan, z.dtype)
        wide[:, :num_experts] = z
        z = wide[:, :num_experts]
    elif layout == "reversed":
        z = z[::-1]
    elif layout == "every other":
        z = np.repeat(z, 2, axis=1)[:, ::2]
    elif layout == "fortran":
        z = np.asfortranarray(z)
    return z


def reference_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def result_dtype(logits):
    return "float64" if logits.dtype == np.float64 else "float32"


@given(logits=logit_arrays(), data=st.data(), threads=st.integers(1, 4))
def test_top_k_equals_the_twin(shared_out, logits, data, threads):
    k = data.draw(st.integers(1, logits.shape[1]))
    normalised = data.draw(st.booleans())
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    result = route(
        logits, config(logits.shape[1], k), norm_topk_prob=normalised,
        routed_scaling_factor=scale, threads=threads,
    )  # fmt: skip
    chosen = reference.choose_experts(logits.astype(np.float64), k)
    np.testing.assert_array_equal(result.expert_indices, chosen)
    assert result.weights.dtype == result_dtype(logits)
    expected = reference.weigh_experts(logits, chosen, "softmax", normalised, scale)
    error = weight_error(logits, result.weights.dtype.name, k if normalised else None)
    assert_close(result.weights, expected, np.take_along_axis(error, chosen, axis=1), scale)
    counts = np.bincount(chosen.ravel(), minlength=logits.shape[1])
    np.testing.assert_array_equal(result.tokens_per_expert, counts)


@given(logits=logit_arrays(), data=st.data(), threads=st.integers(1, 4))
def test_scores_and_groups_equal_the_twin(shared_out, logits, data, threads):
    num_experts = logits.shape[1]
    divisors = [g for g in range(1, num_experts + 1) if num_experts % g == 0]
    n_group = data.draw(st.sampled_from(divisors))
    topk_group = data.draw(st.integers(1, n_group))
    size = num_experts // n_group
    best = data.draw(st.integers(1, min(size, 3)))
    k = data.draw(st.integers(1, topk_group * size))
    scores = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    biased = data.draw(st.booleans())
    normalised = data.draw(st.booleans())
    bias = np.round(seeded(num_experts).standard_normal(num_experts) * 4) / 8 if biased else None
    result = route(
        logits, config(num_experts, k), scores=scores, selection_bias=bias, n_group=n_group,
        topk_group=topk_group, experts_per_group_score=best, norm_topk_prob=normalised,
        threads=threads,
    )  # fmt: skip
    if topk_group == n_group:
        n_group = topk_group = 1
    choice = reference.choice_scores(logits, scores, bias, n_group)
    chosen = reference.choose_experts(choice, k, n_group, topk_group, best)
    for t in range(len(logits)):
        if clear(choice[t], n_group, best, result.weights.dtype.name):
            np.testing.assert_array_equal(result.expert_indices[t], chosen[t])
    assert all(len(set(row)) == k for row in result.expert_indices.tolist())
    expected = reference.weigh_experts(logits, result.expert_indices, scores, normalised, 1.0)
    dtype = result.weights.dtype.name
    if normalised:
        # The chosen need not have the row's largest among them.
        chosen_logits = np.take_along_axis(logits, result.expert_indices, axis=1)
        error = weight_error(chosen_logits, dtype, k)
    else:
        error = np.take_along_axis(weight_error(logits, dtype), result.expert_indices, axis=1)
    scale = 1.0
    if scores == "sigmoid" and normalised:
        # Dividing by a small sum makes what was lost large.
        chosen_scores = np.take_along_axis(reference.sigmoid(logits), result.expert_indices, axis=1)
        scale = 1 / (chosen_scores.sum(axis=1, keepdims=True) + 1e-20)
    assert_close(result.weights, expected, error, scale)


def clear(row, n_group, best, dtype):
    """Whether rounding cannot change which values of a row, and which groups, are larger."""
    values = [row]
    if n_group > 1:
        groups = np.sort(row.reshape(n_group, -1), axis=1)
        values.append(groups[:, -best:].sum(axis=1))
    for value in values:
        gaps = np.diff(np.sort(value[np.isfinite(value)]))
        if np.any((gaps > 0) & (gaps < 64 * EPSILON[dtype] * (1 + np.abs(value).max()))):
            return False
        # Sums of different parts may tie in one precision and not in the other.
        if value is not row and np.any(gaps == 0):
            return False
    return True


@given(logits=logit_arrays(), data=st.data(), threads=st.integers(1, 4))
def test_capacity_equals_the_twin(shared_out, logits, data, threads):
    num_tokens, num_experts = logits.shape
    switch = data.draw(st.booleans())
    k = 1 if switch else data.draw(st.integers(1, num_experts))
    factor = data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.25, 2.0, 1000.0]))
    policy = data.draw(st.sampled_from(["position", "probs"]))
    method = config(num_experts, k, "switch_transformer" if switch else "top_k")
    free = route(logits, method, capacity_factor=math.inf)
    result = route(logits, method, capacity_factor=factor, drop_policy=policy, threads=threads)
    capacity = reference.expert_capacity(num_tokens, k, num_experts, factor)
    chosen, weights = reference.drop(
        free.expert_indices, free.weights, num_experts, capacity, policy
    )
    assert result.capacity == capacity
    np.testing.assert_array_equal(result.expert_indices, chosen)
    np.testing.assert_array_equal(result.weights, weights)
    kept = np.bincount(chosen[chosen >= 0], minlength=num_experts)
    np.testing.assert_array_equal(result.tokens_per_expert, kept)
    np.testing.assert_array_equal(result.tokens_per_expert_before_drop, free.tokens_per_expert)
    assert result.num_dropped == (chosen < 0).sum()
    assert result.num_unrouted == sum(all(e < 0 for e in row) for row in chosen.tolist())
    check_order(result)


def check_order(result):
    offsets, permutation, inverse = reference.sort_by_expert(
        result.expert_indices, result.num_experts
    )
    np.testing.assert_array_equal(result.offsets, offsets)
    np.testing.assert_array_equal(result.permutation, permutation)
    np.testing.assert_array_equal(result.inverse_permutation, inverse)
    tokens, weights = result.by_expert()
    for expert in range(result.num_experts):
        pairs = np.argwhere(result.expert_indices == expert)
        n = len(pairs)
        np.testing.assert_array_equal(tokens[expert, :n], pairs[:, 0])
        np.testing.assert_array_equal(weights[expert, :n], result.weights[tuple(pairs.T)])
        assert (tokens[expert, n:] == -1).all()
        assert (weights[expert, n:] == 0).all()


@given(logits=logit_arrays(), data=st.data(), threads=st.integers(1, 4))
def test_expert_choice_equals_the_twin(shared_out, logits, data, threads):
    num_tokens, num_experts = logits.shape
    method = config(num_experts, data.draw(st.integers(1, num_experts)), "expert_choice")
    factor = data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.25, math.inf]))
    scores = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    in_order = data.draw(st.booleans())
    # With room for every token, the weights are all the scores.
    everything = route(logits, method, scores=scores, capacity_factor=math.inf)
    assert everything.weights.shape == (num_experts, num_tokens)
    expected = reference.score(logits, scores)
    dtype = everything.weights.dtype.name
    assert_close(everything.weights.T, expected, weight_error(logits, dtype))
    result = route(
        logits, method, scores=scores, capacity_factor=factor, sorted=in_order, threads=threads
    )
    capacity = num_tokens
    if factor < math.inf:
        k = method.num_experts_per_tok
        capacity = min(reference.expert_capacity(num_tokens, k, num_experts, factor), num_tokens)
    chosen = reference.choose_tokens(everything.weights.T, capacity, in_order)
    np.testing.assert_array_equal(result.token_indices, chosen)
    np.testing.assert_array_equal(
        result.weights, np.take_along_axis(everything.weights, chosen, axis=1)
    )
    np.testing.assert_array_equal(result.tokens_per_expert, [capacity] * num_experts)
    np.testing.assert_array_equal(result.offsets, np.arange(num_experts + 1) * capacity)
    assert result.num_unrouted == num_tokens - len(set(chosen.ravel().tolist()))
    experts, weights = result.by_token()
    assert len(experts) == num_tokens
    for token in range(num_tokens):
        takers, place = np.nonzero(chosen == token)
        n = len(takers)
        np.testing.assert_array_equal(experts[token, :n], takers)
        np.testing.assert_array_equal(weights[token, :n], result.weights[takers, place])
        assert (experts[token, n:] == -1).all()
        assert (weights[token, n:] == 0).all()


def many_logits(kind):
    """Enough tokens for expert choice to guess its bounds from a sample, by fair means or foul."""
    logits = seeded(7).standard_normal((5000, 8), dtype=np.float32)
    blocks = len(logits) // choose.LANES
    sampled = [blocks * i // (choose.SAMPLE // choose.LANES) for i in range(choose.SAMPLE)]
    in_sample = np.isin(np.arange(len(logits)) // choose.LANES, sampled)
    if kind == "quantised":
        logits = np.round(logits * 2) / 2
    elif kind == "rising":
        logits.sort(axis=0)
    elif kind == "best in the sample":  # every bound is too high
        logits[in_sample, ::2] += 9
    elif kind == "worst in the sample":  # every bound is too low
        logits[in_sample, ::2] -= 9
    return logits


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "kind", ["normal", "quantised", "rising", "best in the sample", "worst in the sample"]
)
def test_expert_choice_of_many_tokens_equals_the_twin(shared_out, kind, scores, threads):
    logits = many_logits(kind)
    method = config(8, 2, "expert_choice")
    everything = route(logits, method, scores=scores, capacity_factor=math.inf)
    assert_close(
        everything.weights.T, reference.score(logits, scores), weight_error(logits, "float32")
    )
    result = route(logits, method, scores=scores, threads=threads)
    chosen = reference.choose_tokens(everything.weights.T, 1250, in_order=False)
    np.testing.assert_array_equal(result.token_indices, chosen)
    np.testing.assert_array_equal(
        result.weights, np.take_along_axis(everything.weights, chosen, axis=1)
    )


OPTIONS = [
    {},
    {"norm_topk_prob": False},
    {"scores": "sigmoid", "selection_bias": True, "n_group": 8, "topk_group": 4},
    {"selection_bias": True},
    {"capacity_factor": 1.0},
    {"capacity_factor": 1.0, "drop_policy": "position"},
    {"method": "switch_transformer"},
    {"method": "expert_choice"},
    {"method": "expert_choice", "scores": "sigmoid", "sorted": True},
]


def call(logits, k=4, method="top_k", selection_bias=False, **options):
    num_experts = logits.shape[1]
    if method == "switch_transformer":
        k = 1
    if selection_bias:
        options["selection_bias"] = np.linspace(-0.3, 0.3, num_experts)
    return route(logits, config(num_experts, k, method), **options)


def assert_same(one, other):
    assert one.weights.tobytes() == other.weights.tobytes()
    assert one.indices.tobytes() == other.indices.tobytes()
    for name in ("tokens_per_expert", "tokens_per_expert_before_drop", "offsets", "permutation"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.num_tokens, one.capacity) == (other.num_tokens, other.capacity)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_experts", [8, 64, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_level_threads_and_batching_leave_the_bits_alone(dtype, num_experts, options, level):
    logits = (seeded(1).standard_normal((300, num_experts)) * 4).astype(reference_dtype(dtype))
    result = call(logits, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", load("baseline"))
        assert_same(call(logits, **options), result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "LOGITS_PER_THREAD", 0)
        for threads in (2, 3):
            assert_same(call(logits, threads=threads, **options), result)
    if result.capacity is None:
        for token in (0, 17, 299):
            alone = call(logits[token : token + 1], **options)
            assert alone.weights.tobytes() == result.weights[token : token + 1].tobytes()
            np.testing.assert_array_equal(alone.expert_indices[0], result.expert_indices[token])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_out_is_written_over(options):
    first, second = seeded(2).standard_normal((2, 50, 16)).astype(np.float32)
    expected = call(second, **options)
    out = call(first, **options)
    held = out.weights, out.indices, out.permutation, out.offsets
    assert call(second, out=out, **options) is out
    assert_same(out, expected)
    assert (out.weights, out.indices)[0] is held[0]
    assert out.indices is held[1]
    if out.num_dropped == 0:
        assert out.permutation is held[2]
        assert out.offsets is held[3]


@st.composite
def one_token_calls(draw):
    """One token as callers may hold it, and options, to be asked for again and again."""
    num_experts, k = draw(st.sampled_from([(4, 2), (8, 2), (16, 1), (40, 8), (64, 8), (70, 20)]))
    dtype = reference_dtype(draw(st.sampled_from(DTYPES)))
    room = seeded(draw(st.integers(0, 99))).standard_normal((1, 2 * num_experts)).astype(dtype)
    form = draw(st.sampled_from(["whole", "part", "strided", "swapped", "unaligned", "read-only"]))
    logits = room[:, :num_experts]
    if form == "strided":
        logits = room[:, ::2]
    elif form == "swapped" and dtype.kind == "f":
        logits = logits.astype(dtype.newbyteorder())
    elif form == "unaligned":
        logits = np.frombuffer(b"-" + room.tobytes(), dtype, num_experts, 1)[None]
    elif form != "part":
        logits = logits.copy()
        logits.flags.writeable = form != "read-only"
    options = draw(
        st.sampled_from(
            [
                {},
                {"norm_topk_prob": False},
                {"scores": "sigmoid"},
                {"n_group": 2},
                {"capacity_factor": 0.0},
                {"selection_bias": np.arange(num_experts) / 8},
            ]
        )
    )
    return logits, MoeConfig(num_experts, k), options


@given(calls=st.lists(one_token_calls(), min_size=1, max_size=3), data=st.data())
def test_one_token_again_and_again(calls, data):
    outs = [route(logits, config, **options) for logits, config, options in calls]
    for _ in range(4):
        logits, config, options = data.draw(st.sampled_from(calls))
        expected = route(logits, config, **options)
        for out in outs:
            if (out.indices.shape, out.num_experts, out.weights.dtype) == (
                expected.indices.shape,
                expected.num_experts,
                expected.weights.dtype,
            ):
                _ = out.permutation
                assert route(logits, config, out=out, **options) is out
                assert_same(out, expected)


def test_one_token_again_is_checked_like_the_first():
    method = config(4, 2)
    logits = np.arange(4.0)[None]
    out = route(logits, method)
    nan = np.array([[0.0, np.nan, 0.0, 0.0]])
    for bad, error, match in [
        (nan, RoutingError, "logits of token 0 hold a NaN"),
        (logits.astype(int), TypeError, "got int64"),
        (logits.astype(np.float32), MoeConfigError, "out must be a routing by "),
        (np.zeros((2, 4)), MoeConfigError, "out must be a routing by "),
        (np.zeros((1, 5)), RoutingError, "logits must have the shape"),
        (np.zeros(4), RoutingError, "logits must have the shape"),
        (logits[None], RoutingError, "logits must have the shape"),
    ]:
        route(logits, method, out=out)
        with pytest.raises(error, match=match):
            route(bad, method, out=out)
    for options, error, match in [
        ({"n_group": True}, TypeError, "n_group must be an integer, got True"),
        ({"scores": "tanh"}, MoeConfigError, "scores must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"threads": 0}, MoeConfigError, "threads must be at least 1, got 0"),
    ]:
        route(logits, method, out=out)
        with pytest.raises(error, match=match):
            route(logits, method, out=out, **options)
    assert_same(route(logits, method, out=out), route(logits, method))


def test_one_token_again_into_other_arrays():
    method = config(4, 2)
    logits = np.arange(4.0)[None]
    out = route(logits, method)
    for weights in (np.zeros((1, 2)), np.zeros((1, 4))[:, :2]):
        out.weights = weights
        assert_same(route(logits, method, out=out), route(logits, method))
        assert out.weights is weights
    for name, array in [
        ("weights", np.zeros((1, 2), np.float32)),
        ("weights", np.zeros((1, 3))),
        ("tokens_per_expert", np.zeros(3, np.int64)),
    ]:
        out = route(logits, method)
        setattr(out, name, array)
        if name == "tokens_per_expert":
            out.tokens_per_expert_before_drop = array
        with pytest.raises(MoeConfigError, match="out must be a routing by "):
            route(logits, method, out=out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pickles(options):
    result = call(seeded(3).standard_normal((20, 16)), **options)
    assert_same(pickle.loads(pickle.dumps(result)), result)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [8, 40, 264])
def test_a_nan_names_its_token(options, dtype, num_experts):
    logits = np.zeros((70, num_experts), reference_dtype(dtype))
    for token, expert in [(69, 0), (33, 3), (32, num_experts - 1)]:
        logits[token, expert] = np.nan
        with pytest.raises(RoutingError, match=rf"^logits of token {token} hold a NaN$"):
            call(logits, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "LOGITS_PER_THREAD", 0)
        with pytest.raises(RoutingError, match="token 32 "):
            call(logits, threads=3, **options)


def test_infinities_are_limits():
    inf = np.inf
    logits = np.array([[-inf, -inf, -inf], [inf, 0, inf], [0, -inf, -inf]], np.float32)
    result = route(logits, config(3, 2))
    np.testing.assert_array_equal(result.expert_indices, [[0, 1], [0, 2], [0, 1]])
    np.testing.assert_array_equal(result.weights, [[0.5, 0.5], [0.5, 0.5], [1, 0]])
    result = route(logits, config(3, 3), norm_topk_prob=False)
    third = np.float32(1) / np.float32(3)
    np.testing.assert_array_equal(result.weights, [[third] * 3, [0.5, 0.5, 0], [1, 0, 0]])
    result = route(logits, config(3, 1), scores="sigmoid", norm_topk_prob=False)
    np.testing.assert_array_equal(result.weights, [[0], [1], [0.5]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_logits_go_to_the_lowest_experts(level, dtype):
    signs = np.random.default_rng(0).choice([-1, 1], (20, 300))
    for num_experts in (4, 64, 300):
        zeros = np.copysign(np.zeros((20, num_experts), dtype), signs[:, :num_experts])
        for logits in (zeros + 1, zeros, zeros - np.inf):
            result = route(logits, config(num_experts, 3))
            np.testing.assert_array_equal(result.expert_indices, [[0, 1, 2]] * 20)


def test_no_tokens():
    for method, shape in [("top_k", (0, 2)), ("expert_choice", (4, 0))]:
        result = route(np.empty((0, 4)), config(4, 2, method))
        assert result.weights.shape == shape
        assert result.num_dropped == result.num_unrouted == 0
        np.testing.assert_array_equal(result.offsets, [0] * 5)


def test_switch_has_a_capacity_by_default():
    result = route(np.tile([1.0, 0.0], (8, 1)), config(2, 1, "switch_transformer"))
    assert result.capacity == math.ceil(8 / 2 * 1.25) == 5
    np.testing.assert_array_equal(result.expert_indices.ravel(), [0] * 5 + [-1] * 3)
    np.testing.assert_allclose(result.weights[:5], 1 / (1 + math.exp(-1)), rtol=1e-15)


def test_reads_what_numpy_reads(tmp_path):
    logits = seeded(4).standard_normal((40, 8)).astype(np.float32)
    expected = route(logits, config(8, 2))
    np.save(tmp_path / "logits.npy", logits)
    assert_same(route(np.load(tmp_path / "logits.npy", mmap_mode="r"), config(8, 2)), expected)
    assert_same(route(logits.astype(">f4"), config(8, 2)), expected)
    assert_same(
        route(logits.astype(float).tolist(), config(8, 2)),
        route(logits.astype(float), config(8, 2)),
    )
    unaligned = np.frombuffer(b"x" + logits.tobytes(), np.uint8)[1:].view(np.float32)
    assert_same(route(unaligned.reshape(40, 8), config(8, 2)), expected)


SWITCH = config(4, 1, "switch_transformer")
CHOICE = config(4, 1, "expert_choice")


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (
            TypeError,
            "logits must be float32, float64, bfloat16 or float16, got int64",
            {"logits": [[1, 2, 3, 4]]},
        ),
        (RoutingError, r"num_experts = 4\), got \(2, 3\)", {"logits": np.zeros((2, 3))}),
        (RoutingError, r"num_experts = 4\), got \(4,\)", {"logits": np.zeros(4)}),
        (TypeError, "config must be a MoeConfig, got 4", {"config": 4}),
        (TypeError, r"config must be a MoeConfig, got \[4\]", {"config": [4]}),
        (MoeConfigError, "num_experts_per_tok must be at most", {"config": config(4, 5)}),
        (
            MoeConfigError,
            "num_experts_per_tok must be 1 for switch_transformer",
            {"config": config(4, 2, "switch_transformer")},
        ),
        (
            MoeConfigError,
            "norm_topk_prob has no meaning for switch",
            {"config": SWITCH, "norm_topk_prob": True},
        ),
        (
            MoeConfigError,
            "drop_policy has no meaning for expert_choice",
            {"config": CHOICE, "drop_policy": "probs"},
        ),
        (
            MoeConfigError,
            "selection_bias has no meaning for expert_choice",
            {"config": CHOICE, "selection_bias": [0, 0, 0, 0]},
        ),
        (MoeConfigError, "sorted has no meaning for top_k", {"sorted": True}),
        (MoeConfigError, "scores must be 'softmax' or 'sigmoid', got 'tanh'", {"scores": "tanh"}),
        (
            MoeConfigError,
            "drop_policy must be 'position' or 'probs', got 'random'",
            {"drop_policy": "random"},
        ),
        (
            MoeConfigError,
            "routed_scaling_factor must be a positive number, got 0.0",
            {"routed_scaling_factor": 0},
        ),
        (
            MoeConfigError,
            "routed_scaling_factor must be a positive number, got nan",
            {"routed_scaling_factor": math.nan},
        ),
        (MoeConfigError, "capacity_factor must be at least 0, got -1.0", {"capacity_factor": -1}),
        (
            MoeConfigError,
            "capacity_factor must be at least 0, got nan",
            {"capacity_factor": math.nan},
        ),
        (TypeError, "capacity_factor must be a number, got '1'", {"capacity_factor": "1"}),
        (TypeError, r"capacity_factor must be a number, got \[1\]", {"capacity_factor": [1]}),
        (
            MoeConfigError,
            "capacity_factor is larger than any float",
            {"capacity_factor": 10**400},
        ),
        (MoeConfigError, r"n_group must divide 4, the number of experts, got 3", {"n_group": 3}),
        (TypeError, "n_group must be an integer, got True", {"n_group": True}),
        (
            MoeConfigError,
            r"topk_group must be at most 2, the number of groups, got 3",
            {"n_group": 2, "topk_group": 3},
        ),
        (
            MoeConfigError,
            r"topk_group must give a token at least 2 experts to choose",
            {"n_group": 4, "topk_group": 1},
        ),
        (
            MoeConfigError,
            "must not exceed the 2 experts of a group, got 3",
            {"n_group": 2, "experts_per_group_score": 3},
        ),
        (
            MoeConfigError,
            r"selection_bias must have the shape .* = \(4,\), got \(3,\)",
            {"selection_bias": [0, 0, 0]},
        ),
        (MoeConfigError, "selection_bias must be finite", {"selection_bias": [0, 0, 0, math.inf]}),
        (TypeError, "selection_bias must hold numbers, got <U1", {"selection_bias": list("abcd")}),
        (MoeConfigError, "threads must be at least 1, got 0", {"threads": 0}),
        (TypeError, "out must be a Routing, got ndarray", {"out": np.zeros(3)}),
        (TypeError, "unexpected keyword argument 'capacity'", {"capacity": 3}),
    ],
    ids=lambda value: None,
)
def test_bad_arguments_are_named(error, match, arguments):
    arguments = {"logits": np.zeros((2, 4)), "config": config(4, 2), **arguments}
    with pytest.raises(error, match=match):
        route(**arguments)


def test_an_out_that_does_not_fit():
    out = route(np.zeros((3, 4)), config(4, 2))
    for logits, method in [
        (np.zeros((4, 4)), config(4, 2)),
        (np.zeros((3, 4), np.float32), config(4, 2)),
        (np.zeros((3, 5)), config(5, 2)),
        (np.zeros((3, 4)), config(4, 3)),
        (np.zeros((3, 4)), config(4, 2, "expert_choice")),
    ]:
        with pytest.raises(MoeConfigError, match=r"^out must be a routing by "):
            route(logits, method, out=out)


def test_too_many_pairs_for_int32():
    logits = np.broadcast_to(np.zeros((1, 2)), (2**30, 2))
    with pytest.raises(RoutingError, match="1073741824 x 2 pairs do not fit into int32 indices"):
        route(logits, config(2, 2))


def test_each_form_says_where_the_other_is():
    by_token = route(np.zeros((3, 4)), config(4, 2))
    with pytest.raises(AttributeError, match=re.escape("by_expert() gives token_indices")):
        _ = by_token.token_indices
    by_expert = route(np.zeros((3, 4)), config(4, 2, "expert_choice"))
    with pytest.raises(AttributeError, match=re.escape("by_token() gives expert_indices")):
        _ = by_expert.expert_indices


def test_padding_to_a_width():
    result = route(np.zeros((3, 4)), config(4, 2))
    tokens, weights = result.by_expert(width=4)
    np.testing.assert_array_equal(tokens[0], [0, 1, 2, -1])
    np.testing.assert_array_equal(weights[:, 0], [0.5, 0.5, 0, 0])
    with pytest.raises(MoeConfigError, match="width must be at least 3, the tokens of the fullest"):
        result.by_expert(width=2)
    with pytest.raises(MoeConfigError, match="width is for top-k and Switch"):
        route(np.zeros((3, 4)), config(4, 2, "expert_choice")).by_expert(width=2)


def test_repr_is_short():
    result = route(np.zeros((3, 4)), config(4, 2), capacity_factor=1.0)
    assert repr(result) == (
        "Routing(method='top_k', num_tokens=3, num_experts=4, num_experts_per_tok=2, "
        "capacity=2, num_dropped=2)"
    )
    assert isinstance(result, Routing)


@pytest.mark.parametrize("num_experts", [4, 8, 16, 40])
@pytest.mark.parametrize("written", [0, -5, 2**31 - 1, "num_experts", "last"])
def test_indices_that_somebody_wrote_over_stay_within_memory(num_experts, written):
    value = {"num_experts": num_experts, "last": num_experts - 1}.get(written, written)
    result = route(seeded(0).standard_normal((500, num_experts)), config(num_experts, 2))
    result.expert_indices[:] = value
    assert result.permutation.shape == (1000,)
    assert result.offsets[-1] == 1000
    result = route(seeded(0).standard_normal((500, num_experts)), config(num_experts, 2))
    result.tokens_per_expert[:] = written if isinstance(written, int) else 10**6
    assert result.permutation.shape == (1000,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_router_routes_as_route_does(options, dtype):
    logits = (seeded(5).standard_normal((2, 300, 16)) * 3).astype(reference_dtype(dtype))
    router = router_of(16, **options)
    out = None
    for batch in logits:
        expected = call(batch, **options)
        assert_same(router(batch), expected)
        assert_same(router(batch, threads=2), expected)
        out = router(batch, out=out)
        assert_same(out, expected)
    assert_same(pickle.loads(pickle.dumps(router))(batch), expected)


def router_of(num_experts, k=4, method="top_k", selection_bias=False, **options):
    """The router of `call`."""
    if selection_bias:
        options["selection_bias"] = np.linspace(-0.3, 0.3, num_experts)
    return Router(
        config(num_experts, 1 if method == "switch_transformer" else k, method), **options
    )


@given(data=st.data())
def test_one_token_by_routers_and_by_route(data):
    """Into the same result, in any order: none takes the other's call for its own."""
    moe = config(8, 2)
    ways = [{}, {"norm_topk_prob": False}, {"scores": "sigmoid"}, {"capacity_factor": 0.0}]
    ways.append({"selection_bias": np.linspace(3, 0, 8)})
    routers = [Router(moe, **options) for options in ways]
    out = route(np.zeros((1, 8)), moe)
    for _ in range(8):
        logits = seeded(data.draw(st.integers(0, 99))).standard_normal((1, 8))
        way = data.draw(st.integers(0, len(ways) - 1))
        if data.draw(st.booleans()):
            routers[way](logits, out=out)
        else:
            route(logits, moe, out=out, **ways[way])
        assert_same(out, routers[way](logits))


def test_the_same_options_are_checked_once(monkeypatch):
    router = Router(config(4, 2), scores="sigmoid")
    monkeypatch.setattr(MoeConfig, "validate", lambda self: pytest.fail("checked again"))
    logits = seeded(6).standard_normal((3, 4))
    assert router(logits) == router(logits, out=router(logits + 1))


def test_a_router_with_other_options():
    router = Router(config(4, 2), scores="sigmoid", norm_topk_prob=False)
    other = router.replace(norm_topk_prob=True, capacity_factor=1.0)
    assert other == Router(config(4, 2), scores="sigmoid", capacity_factor=1.0)
    assert router.options == {"scores": "sigmoid", "norm_topk_prob": False}
    assert other.options == {"scores": "sigmoid", "norm_topk_prob": True, "capacity_factor": 1.0}
    with pytest.raises(MoeConfigError, match="capacity_factor must be at least 0, got -1"):
        router.replace(capacity_factor=-1)


def test_routers_are_equal_if_they_route_alike():
    router = Router(config(4, 2))
    assert router == Router(config(4, 2), norm_topk_prob=True, n_group=2, topk_group=2)
    assert hash(router) == hash(Router(config(4, 2), norm_topk_prob=True))
    assert router != Router(config(4, 3))
    assert router != Router(config(4, 2), scores="sigmoid")
    assert router != "router"
    biased = [Router(config(4, 2), selection_bias=bias) for bias in ([0.0] * 4, [0] * 4, [1.0] * 4)]
    assert biased[0] == biased[1]
    assert biased[0] != biased[2]
    assert router != biased[0]
    assert repr(Router(config(4, 2), scores="sigmoid")) == (
        "Router(MoeConfig(num_experts=4, num_experts_per_tok=2, "
        "routing_method=<RoutingMethod.TOP_K: 'top_k'>, gate_hidden_dim=None), scores='sigmoid')"
    )


def test_a_router_keeps_its_own_bias():
    bias = np.zeros(4)
    router = Router(config(4, 1), selection_bias=bias)
    bias[3] = 9
    assert router(np.zeros((1, 4))).expert_indices.tolist() == [[0]]


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "unexpected keyword argument 'score'; its options are scores, ", {"score": 1}),
        (MoeConfigError, "scores must be 'softmax' or 'sigmoid'", {"scores": "tanh"}),
        (TypeError, "n_group must be an integer, got True", {"n_group": True}),
        (MoeConfigError, r"selection_bias must have the shape", {"selection_bias": [0.0]}),
        (MoeConfigError, "selection_bias must be finite", {"selection_bias": [0, 0, 0, math.inf]}),
        (TypeError, "selection_bias must hold numbers", {"selection_bias": list("abcd")}),
    ],
)
def test_options_are_checked_when_a_router_is_made(error, match, options):
    with pytest.raises(error, match=match):
        Router(config(4, 2), **options)


def bfloat16_bits(values):
    """float32 values cut to bfloat16: as its bits, and as float32."""
    bits = np.asarray(values, np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16).view(BFLOAT16_BITS), (bits << 16).view(np.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_experts", [8, 264])
def test_the_bits_of_bfloat16_route_as_float32(options, num_experts):
    bits, same = bfloat16_bits(seeded(8).standard_normal((70, num_experts)))
    expected = call(same, **options)
    assert_same(call(bits, **options), expected)
    assert_same(call(bits[::-1][::-1], threads=3, **options), expected)
    assert_same(call(np.asfortranarray(bits), **options), expected)
    assert_same(call(bits[:1], **options), call(same[:1], **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_tensors_are_taken_as_they_are(options, dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    # What the kernels read of a tensor are bits: nothing else needs to know bfloat16.
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    logits = torch.randn(70, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = logits.to(getattr(torch, dtype))
    # The same values in a dtype that NumPy has; none is rounded.
    same = (logits if dtype == "float64" else logits.float()).numpy().copy()
    logits.requires_grad_()
    expected = call(same, **options)
    for tensor in (logits, logits.detach(), logits.t().contiguous().t()):
        assert_same(call(tensor, **options), expected)
        assert_same(router_of(16, **options)(tensor), expected)
    out = call(logits[:1], **options)
    for token in (0, 1, 1, 69):
        assert call(logits[token : token + 1], out=out, **options) is out
        assert_same(out, call(same[token : token + 1], **options))


def test_a_bias_may_be_a_tensor():
    torch = pytest.importorskip("torch")
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 8).bfloat16())
    logits = seeded(9).standard_normal((50, 8))
    expected = route(logits, config(8, 2), selection_bias=bias.detach().float().numpy())
    assert_same(route(logits, config(8, 2), selection_bias=bias), expected)
    assert_same(Router(config(8, 2), selection_bias=bias)(logits), expected)


def test_other_tensors():
    torch = pytest.importorskip("torch")
    negative = torch.randn(5, 4, dtype=torch.complex64).conj().imag  # which NumPy cannot share
    assert_same(route(negative, config(4)), route(-(-negative).numpy(), config(4)))
    rows = [torch.randn(4).bfloat16() for _ in range(3)]
    assert_same(route(rows, config(4)), route(torch.stack(rows), config(4)))
    for error, match, tensor in [
        (
            RoutingError,
            r"^logits must be on the CPU, got a tensor on meta; use logits.cpu\(\)$",
            torch.zeros(3, 4, device="meta"),
        ),
        (TypeError, r"must be dense, got torch.sparse_coo", torch.zeros(3, 4).to_sparse()),
        (TypeError, r"float16, got int64$", torch.zeros(3, 4, dtype=torch.int64)),
        (TypeError, r"float16, got torch.float8_e5m2$", torch.zeros(3, 4).to(torch.float8_e5m2)),
        (RoutingError, r"num_experts = 4\), got \(3, 5\)$", torch.zeros(3, 5).bfloat16()),
        (
            MoeConfigError,
            r"logits must be tensors of one shape, got the shapes \[\(4,\), \(5,\)\]",
            [torch.zeros(4), torch.zeros(5)],
        ),
        (RoutingError, "token 1 hold a NaN", torch.tensor([[0.0] * 4, [torch.nan] * 4]).bfloat16()),
    ]:
        with pytest.raises(error, match=match):
            route(tensor, config(4))
