"""Routing backwards: kernels against their plain twin, and the twin against differences."""

import importlib.util

import numpy as np
import pytest

from moe_fast import MoeConfig, kernels, route
from moe_fast.kernels.level import load
from moe_fast.routing import choose
from moe_fast.routing.gradients import Choice, pull_back
from moe_fast.routing.options import make_rule
from moe_fast.routing.result import Softmax
from moe_fast.routing.statistics import sum_probabilities
from reference import routing as reference

DTYPES = ["float32", "float64", "bfloat16", "float16"]
if importlib.util.find_spec("ml_dtypes") is None:
    DTYPES.remove("bfloat16")
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53}
# Both sides of where tokens stop being worked on in lanes, multiples of them or not.
SIZES = [(1, 1), (8, 2), (31, 5), (32, 32), (40, 3), (264, 8)]
SCORES = ["softmax", "sigmoid"]

pytestmark = pytest.mark.usefixtures("level")


def seeded(*seed):
    return np.random.default_rng(seed)


def make_logits(num_experts, dtype, num_tokens=37):
    logits = seeded(num_experts).standard_normal((num_tokens, num_experts)) * 3
    if dtype == "bfloat16":
        import ml_dtypes

        return logits.astype(ml_dtypes.bfloat16)
    return logits.astype(dtype)


def assert_close(gradient, expected, given):
    """Within 64 roundings of what a token is given, which no score multiplies by more than 1."""
    assert gradient.dtype == ("float64" if gradient.itemsize == 8 else "float32")
    largest = np.abs(given).max(axis=1, keepdims=True, initial=0)
    assert (np.abs(gradient - expected) <= 64 * EPSILON[gradient.dtype.name] * largest).all()


def rule_of(num_experts, k, scores, normalised, scale=2.5):
    return make_rule(MoeConfig(num_experts, k), False, scores, normalised, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_weights_equal_the_twin(num_experts, k, scores, normalised, dtype):
    logits = make_logits(num_experts, dtype)
    routing = route(logits, MoeConfig(num_experts, k), scores=scores)
    chosen = routing.expert_indices
    given = seeded(k).standard_normal(chosen.shape).astype(routing.weights.dtype)
    rule = rule_of(num_experts, k, scores, normalised)
    result = pull_back(logits, rule, 1, choice=Choice(chosen, given))
    expected = reference.pull_back_weights(logits, chosen, given, scores, normalised, 2.5)
    assert_close(result, expected, 2.5 * given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_expert_choice_equals_the_twin(num_experts, k, scores, dtype):
    logits = make_logits(num_experts, dtype)
    config = MoeConfig(num_experts, k, "expert_choice")
    routing = route(logits, config, scores=scores)
    chosen = routing.token_indices
    given = seeded(k).standard_normal(chosen.shape).astype(routing.weights.dtype)
    rule = make_rule(config, False, scores, None, 2.5)
    result = pull_back(logits, rule, 1, choice=Choice(chosen, given))
    of_scores = np.zeros(logits.shape)
    for expert in range(num_experts):
        of_scores[chosen[expert], expert] = given[expert] * 2.5
    expected = reference.pull_back_scores(logits, of_scores, scores, scores == "softmax")
    assert_close(result, expected, of_scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("num_experts", [1, 8, 31, 32, 40, 264])
def test_means_equal_the_twin(num_experts, scores, dtype):
    logits = make_logits(num_experts, dtype)
    given = seeded(num_experts).standard_normal(num_experts) * len(logits)
    rule = rule_of(num_experts, 1, scores, True)
    result = pull_back(logits, rule, 1, mean_gradient=given)
    each = np.tile(given / len(logits), (len(logits), 1))
    expected = reference.pull_back_scores(logits, each, scores, True)
    assert_close(result, expected, each)
    result = pull_back(logits, rule, 1, square_gradient=3.0)
    nothing = np.zeros(logits.shape)
    expected = reference.pull_back_scores(logits, nothing, "softmax", True, 6 / len(logits))
    assert_close(result, expected, 6 / len(logits) * reference.log_sum_exp(logits)[:, np.newaxis])


def keep_softmax(logits, rule):
    dtype = "float64" if logits.itemsize == 8 else "float32"
    softmax = Softmax(np.empty(logits.shape, dtype), np.empty(len(logits)))
    sum_probabilities(logits, rule, 1, softmax)
    return softmax


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_what_the_losses_kept_serves_all_gradients(num_experts, k, normalised, dtype):
    """With it or without, weights and losses in one pass: the sum of the gradients by each."""
    logits = make_logits(num_experts, dtype)
    rule = rule_of(num_experts, k, "softmax", normalised)
    routing = route(logits, MoeConfig(num_experts, k))
    given = seeded(k).standard_normal(routing.weights.shape).astype(routing.weights.dtype)
    of_means = seeded(num_experts).standard_normal(num_experts) * len(logits)
    weights = Choice(routing.expert_indices, given)
    expected = reference.pull_back_weights(
        logits, routing.expert_indices, given, "softmax", normalised, 2.5
    )
    each = np.tile(of_means / len(logits), (len(logits), 1))
    of_square = 6 / len(logits)
    expected = expected + reference.pull_back_scores(logits, each, "softmax", True, of_square)
    largest = np.concatenate(
        [2.5 * given, each, of_square * reference.log_sum_exp(logits)[:, np.newaxis]], axis=1
    )
    for kept in (None, keep_softmax(logits, rule)):
        result = pull_back(
            logits, rule, 1, choice=weights, mean_gradient=of_means, square_gradient=3.0,
            softmax=kept,
        )  # fmt: skip
        assert_close(result, expected, largest)


def differences(function, logits, step=1e-6):
    """The gradient of a function of logits by central differences."""
    result = np.empty(logits.shape)
    for place in np.ndindex(logits.shape):
        values = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[place] += sign * step
            values.append(function(moved))
        result[place] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("scores", SCORES)
def test_the_twin_is_the_slope(scores, normalised):
    logits = seeded(0).standard_normal((3, 5))
    chosen = reference.choose_experts(logits, 2)
    given = seeded(1).standard_normal(chosen.shape)
    expected = differences(
        lambda z: np.sum(given * reference.weigh_experts(z, chosen, scores, normalised, 2.5)),
        logits,
    )
    result = reference.pull_back_weights(logits, chosen, given, scores, normalised, 2.5)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-8)
    given = seeded(2).standard_normal(logits.shape)
    score = reference.probabilities if normalised else reference.score
    expected = differences(lambda z: np.sum(given * score(z, scores)), logits)
    result = reference.pull_back_scores(logits, given, scores, normalised)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-8)
    expected += differences(lambda z: 0.7 / 2 * np.sum(reference.log_sum_exp(z) ** 2), logits)
    if scores == "softmax":
        result = reference.pull_back_scores(logits, given, scores, normalised, 0.7)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-8)


def all_gradients(logits, threads=1, k=4):
    """Of every kind, as bytes."""
    num_experts = logits.shape[1]
    routing = route(logits, MoeConfig(num_experts, k))
    given = seeded(3).standard_normal((len(logits), k)).astype(routing.weights.dtype)
    of_means = seeded(4).standard_normal(num_experts)
    for scores in SCORES:
        for normalised in (True, False):
            rule = rule_of(num_experts, k, scores, normalised)
            choice = Choice(routing.expert_indices, given)
            for kept in (None, keep_softmax(logits, rule)):
                yield pull_back(
                    logits, rule, threads, choice=choice, mean_gradient=of_means,
                    square_gradient=1.0, softmax=kept,
                ).tobytes()  # fmt: skip
            yield pull_back(logits, rule, threads, choice=choice).tobytes()
        yield pull_back(logits, rule, threads, mean_gradient=of_means).tobytes()
        config = MoeConfig(num_experts, k, "expert_choice")
        by_expert = route(logits, config, scores=scores)
        choice = Choice(by_expert.token_indices, by_expert.weights)
        rule = make_rule(config, False, scores)
        yield pull_back(logits, rule, threads, choice=choice).tobytes()
    yield pull_back(logits, rule, threads, square_gradient=1.0).tobytes()


@pytest.mark.parametrize("num_experts", [8, 64, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_level_threads_and_strides_leave_the_bits_alone(dtype, num_experts, level, monkeypatch):
    logits = make_logits(num_experts, dtype, 300)
    expected = list(all_gradients(logits))
    monkeypatch.setattr(choose, "LOGITS_PER_THREAD", 0)
    assert list(all_gradients(logits, 3)) == expected
    wide = np.full((300, num_experts + 3), np.nan, logits.dtype)
    wide[:, :num_experts] = logits
    assert list(all_gradients(wide[:, :num_experts])) == expected
    assert list(all_gradients(np.asfortranarray(logits))) == expected
    monkeypatch.setattr(kernels, "compiled", load("baseline"))
    assert list(all_gradients(logits)) == expected


@pytest.mark.parametrize("num_experts", [4, 40])
def test_infinities_are_limits(num_experts):
    """Experts at the top share the softmax, and so its gradient; the others have none."""
    logits = np.full((3, num_experts), -np.inf, np.float32)
    logits[1, 1:3] = np.inf
    logits[2, 0] = 0.0
    rule = rule_of(num_experts, 1, "softmax", False)
    given = np.arange(num_experts) * 3.0
    result = pull_back(logits, rule, 1, mean_gradient=given)
    expected = np.zeros_like(logits)
    expected[0] = (np.arange(num_experts) - (num_experts - 1) / 2) / num_experts
    expected[1, 1:3] = -0.25, 0.25
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    everyone = np.tile(np.arange(3, dtype=np.int32), (num_experts, 1))
    sigmoid = pull_back(
        logits,
        make_rule(MoeConfig(num_experts, 1, "expert_choice"), False, "sigmoid"),
        1,
        choice=Choice(everyone, np.ones((num_experts, 3), np.float32)),
    )
    assert sigmoid[2, 0] == 0.25
    assert np.count_nonzero(sigmoid) == 1


def test_no_tokens():
    assert [len(result) for result in all_gradients(np.empty((0, 8), np.float32))] == [0] * 17
