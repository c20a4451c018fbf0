"""Rows that spread tokens evenly, clusters, and kinds, each against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from moe_fast import ArgumentTypeError, MoeConfigError, RouterStart
from moe_fast.calibration.balancing import (
    balance,
    find_offsets,
    mean_input,
    remove_direction,
    remove_span,
    topic_directions,
)
from moe_fast.calibration.clustering import spherical_k_means, unit_rows
from moe_fast.calibration.kinds import mean_rows, ridge_rows
from moe_fast.calibration.selection import spread
from moe_fast.calibration.texts import TokenSequences

RNG = np.random.default_rng(0)


def tokens_with_a_shared_direction(count: int, width: int = 48) -> np.ndarray:
    """Tokens as trained models have them: a third of their energy is one direction."""
    shared = np.random.default_rng(7).standard_normal(width)
    own = np.random.default_rng(count).standard_normal((count, width))
    return (own + 0.7 * shared).astype(np.float32)


def load_cv(rows: np.ndarray, inputs: np.ndarray, k: int) -> float:
    """The coefficient of variation of the experts' load, counted by hand."""
    chosen = np.argsort(-(inputs @ rows.T), axis=1, kind="stable")[:, :k]
    load = np.bincount(chosen.ravel(), minlength=len(rows))
    return float(load.std() / load.mean())


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (5, 1), (64, 8), (2, 1)])
def test_balanced_rows_are_even_on_tokens_that_they_have_not_seen(experts, k):
    used, others = tokens_with_a_shared_direction(6000), tokens_with_a_shared_direction(6001)
    rows = np.random.default_rng(experts).standard_normal((experts, 48)).astype(np.float32)
    without = remove_direction(rows, mean_input(used))
    even = balance(without, used, k)
    assert load_cv(rows, others, k) > 0.3
    assert load_cv(even, used, k) < 0.02
    # Counting alone scatters by the root of E / (T k).
    assert load_cv(even, others, k) < 0.03 + 2 * np.sqrt(experts / (6001 * k))


def test_removing_a_direction_is_its_formula():
    rows = RNG.standard_normal((6, 20)).astype(np.float32)
    direction = RNG.standard_normal(20)
    unit = direction / np.linalg.norm(direction)
    expected = rows @ (np.eye(20) - np.outer(unit, unit))
    np.testing.assert_allclose(remove_direction(rows, direction), expected, atol=1e-6)
    assert remove_direction(rows, np.zeros(20)) is rows


def test_topics_are_the_directions_of_the_means_of_pieces():
    topics = RNG.standard_normal((3, 64))
    texts = RNG.standard_normal((10, 3)) @ topics * 5
    inputs = np.repeat(texts, 256, axis=0) + RNG.standard_normal((2560, 64)) + 2
    found = topic_directions(inputs.astype(np.float32))
    assert found.shape == (8, 64)  # an eighth of 64
    np.testing.assert_allclose(found @ found.T, np.eye(8), atol=1e-6)
    mean = inputs.mean(axis=0)
    assert np.abs(found @ mean).max() < 1e-4 * np.linalg.norm(mean)
    centred = topics - np.outer(topics @ mean, mean) / (mean @ mean)
    left = centred - centred @ found.T @ found
    assert np.linalg.norm(left) < 0.02 * np.linalg.norm(centred)
    rows = RNG.standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_allclose(remove_span(rows, found) @ found.T, 0, atol=1e-5)
    assert len(topic_directions(inputs[:511].astype(np.float32))) == 0
    assert len(topic_directions(np.ones((1024, 64), np.float32))) == 0


def test_rows_without_topics_are_even_on_each_text():
    """Texts that differ: even on all of them together is not yet even on another one."""
    topics = RNG.standard_normal((4, 96))

    def read(number: int) -> np.ndarray:
        texts = np.repeat(RNG.standard_normal((number, 4)) @ topics, 256, axis=0)
        return (texts + RNG.standard_normal(texts.shape) + 1).astype(np.float32)

    used, others = read(24), read(3)
    rows = RNG.standard_normal((8, 96)).astype(np.float32)
    rows = remove_direction(rows, mean_input(used))
    blind = balance(remove_span(rows, topic_directions(used)), used, 2)
    assert load_cv(blind, others, 2) < 0.15
    assert load_cv(balance(rows, used, 2), others, 2) > 2 * load_cv(blind, others, 2)


def test_offsets_are_along_the_mean_and_leave_the_rest_alone():
    inputs = tokens_with_a_shared_direction(3000)
    mean = mean_input(inputs)
    rows = remove_direction(RNG.standard_normal((4, 48)).astype(np.float32), mean)
    moved = balance(rows, inputs, 2)
    unit = mean / np.linalg.norm(mean)
    factor = np.linalg.norm(moved - np.outer(moved @ unit, unit)) / np.linalg.norm(rows)
    np.testing.assert_allclose(remove_direction(moved, mean), rows * factor, atol=1e-5)


def test_groups_keep_what_they_have_together():
    """Within a group loads are evened; how much the group has stays."""
    logits = RNG.standard_normal((4000, 4)).astype(np.float32)
    logits[:, :2] += 2
    logits[:, 0] += 1
    offsets = find_offsets(logits, np.ones(4000, np.float32), 1, [[0, 1], [2, 3]])
    load = np.bincount(np.argmax(logits + offsets, axis=1), minlength=4)
    before = np.bincount(np.argmax(logits, axis=1), minlength=4)
    assert abs(load[0] - load[1]) < 0.03 * load[0]
    assert abs(load[2] - load[3]) < 0.1 * load[2]
    assert before[0] > 1.5 * before[1]
    assert load[:2].sum() > 5 * load[2:].sum()


def blobs(
    count: int = 900, clusters: int = 6, width: int = 24, noise: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Directions around clear centres, a third of them around the first."""
    centres = unit_rows(RNG.standard_normal((clusters, width)))
    labels = np.concatenate([np.zeros(count // 3, int), np.arange(count - count // 3) % clusters])
    vectors = centres[labels] + noise * RNG.standard_normal((count, width))
    return unit_rows(vectors), labels


def test_clusters_of_clear_directions_are_found():
    vectors, labels = blobs()
    centroids, found = spherical_k_means(vectors, 6, seed=3, balanced=False)
    pairs = {(int(a), int(b)) for a, b in zip(labels, found, strict=True)}
    assert len(pairs) == 6
    for number in range(6):
        expected = vectors[found == number].sum(axis=0)
        np.testing.assert_allclose(
            centroids[number], expected / np.linalg.norm(expected), atol=1e-5
        )


def test_balanced_clusters_have_nearly_the_same_size():
    vectors, _ = blobs(noise=0.4)
    for balanced in (False, True):
        _, found = spherical_k_means(vectors, 6, seed=3, balanced=balanced)
        sizes = np.bincount(found, minlength=6)
        assert (sizes.std() / sizes.mean() < 0.1) == balanced


def test_a_seed_decides_the_clusters():
    vectors, _ = blobs()
    first, again, other = (spherical_k_means(vectors, 9, seed=s)[0] for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_as_many_clusters_as_vectors_or_copies_of_one():
    vectors = unit_rows(np.eye(5, dtype=np.float32))
    centroids, labels = spherical_k_means(vectors, 5, seed=0, balanced=False)
    assert sorted(labels.tolist()) == list(range(5))
    np.testing.assert_allclose(centroids[labels], vectors, atol=1e-6)
    same = np.repeat(vectors[:1], 40, axis=0)
    assert np.isfinite(spherical_k_means(same, 3, seed=0)[0]).all()


def test_ridge_rows_are_the_closed_form():
    inputs = [RNG.standard_normal((n, 12)).astype(np.float32) + n / 50 for n in (40, 60, 80)]
    x = np.concatenate(inputs).astype(np.float64)
    y = np.repeat(np.eye(3), [40, 60, 80], axis=0)
    weights = np.linalg.inv(x.T @ x + 0.01 * np.eye(12)) @ x.T @ y
    expected = (weights / np.linalg.norm(weights, axis=0)).T
    np.testing.assert_allclose(ridge_rows(inputs), expected, atol=1e-6)


def test_mean_rows_are_centred():
    inputs = [RNG.standard_normal((n, 12)).astype(np.float32) for n in (5, 9)]
    rows = mean_rows(inputs)
    np.testing.assert_allclose(rows.sum(axis=0), 0, atol=1e-6)
    difference = inputs[0].mean(axis=0) - inputs[1].mean(axis=0)
    np.testing.assert_allclose(rows[0] - rows[1], difference, atol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 100, 399, 400, 1000])
def test_tokens_are_taken_evenly_and_none_twice(count):
    sequences = tuple(np.full(n, i) for i, n in enumerate([10, 30, 5, 55] * 4))
    used, rest = spread(TokenSequences(sequences), count)
    assert used.num_tokens == min(count, 400)
    taken = {int(sequence[0]) for sequence in used.sequences}
    assert taken.isdisjoint(int(sequence[0]) for sequence in rest.sequences)
    if count == 100:
        quarters = {number // 4 for number in taken}
        assert len(quarters) >= 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": 3}, ArgumentTypeError, r"^texts must be files or strings, got 3$"),
        ({"texts": [3]}, ArgumentTypeError, r"^texts must be a path, got 3$"),
        ({"tokens": 3}, ArgumentTypeError, r"^tokens must be a path, got 3$"),
        (
            {"texts": "a", "tokens": "b.npy"},
            MoeConfigError,
            r"^texts must not be given beside tokens: one is read$",
        ),
        ({"tokens_used": 0}, MoeConfigError, r"^tokens_used must be at least 1, got 0$"),
        ({"device": 3}, ArgumentTypeError, r"^device must be a string, got 3$"),
    ],
)
def test_starts_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        RouterStart("calibrated", **options)


def test_tokens_used_without_text():
    with pytest.raises(MoeConfigError, match=r"^tokens_used says how many tokens of texts are"):
        RouterStart("normal", tokens_used=500)


def test_starts_from_text_are_sharp_by_default():
    assert RouterStart("calibrated").logit_std == 3
    assert RouterStart("clustered", logit_std=10).logit_std == 10
    assert RouterStart("normal").logit_std is None
    assert RouterStart("normal", texts="a text").from_text is False
    assert RouterStart("normal", texts="a text", logit_std=1).from_text is True
