"""Spherical k-means (Dhillon and Modha 2001), with clusters of nearly equal size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.balancing import find_offsets
from moe_fast.matmul import matmul

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
MOST_ROUNDS = 12
OFFSET_ROUNDS = 20  # of each of them; balanced clusters need not be exactly so until the end
SETTLED = 0.002  # of the vectors change their cluster


def unit_rows(vectors: npt.NDArray[np.floating]) -> Floats:
    """The vectors scaled to length 1; those of length 0 stay."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def spherical_k_means(
    vectors: Floats, num_clusters: int, seed: int, *, balanced: bool = True
) -> tuple[Floats, Labels]:
    """The centroids of clusters of directions, and the cluster of each vector.

    Each vector belongs to the centroid with which it has the greatest cosine, to which an offset is
    added where clusters are to be `balanced`; each centroid is the sum of its vectors, scaled to
    length 1. It starts as k-means++ does (Arthur and Vassilvitskii 2007).

    Parameters
    ----------
    vectors : ndarray, shape (T, H)
        Of length 1.
    num_clusters : int
        At most T.
    seed : int
        Of the start.
    balanced : bool

    Returns
    -------
    centroids : ndarray, shape (num_clusters, H)
    labels : ndarray, shape (T,)
    """
    centroids = k_means_plus_plus(vectors, num_clusters, seed)
    labels: Labels = np.full(len(vectors), -1)
    for _ in range(MOST_ROUNDS):
        cosines = matmul(vectors, centroids.T)
        found = assign(cosines, balanced=balanced)
        changed = float((found != labels).mean())
        labels = found
        if changed <= (SETTLED if balanced else 0):
            break
        members = labels == np.arange(num_clusters)[:, np.newaxis]
        sums = matmul(members.astype(np.float32), vectors)
        empty = np.flatnonzero(np.bincount(labels, minlength=num_clusters) == 0)
        if len(empty):  # each takes a vector that is far from its centroid
            own = cosines[np.arange(len(vectors)), labels]
            sums[empty] = vectors[np.argsort(own, kind="stable")[: len(empty)]]
        centroids = unit_rows(sums)
    return centroids, labels


def assign(cosines: Floats, *, balanced: bool) -> Labels:
    """The cluster of each vector."""
    if balanced:
        spread = float(np.sqrt(cosines.var(axis=1, dtype=np.float64).mean()))
        if spread > 0:
            scaled = cosines / np.float32(spread)
            offsets = find_offsets(
                scaled, np.ones(len(cosines), np.float32), 1, rounds=OFFSET_ROUNDS
            )
            cosines = scaled + offsets.astype(np.float32)
    labels: Labels = np.argmax(cosines, axis=1)
    return labels


def k_means_plus_plus(vectors: Floats, num_clusters: int, seed: int) -> Floats:
    """Vectors as first centroids, each drawn in proportion to its squared distance from them.

    Of some drawn, the one is taken that leaves the least distance (greedy k-means++).
    """
    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(vectors)))]
    squares = squared_distances(vectors, chosen)[:, 0]
    trials = 2 + int(math.log(num_clusters))
    while len(chosen) < num_clusters:
        squares[chosen] = 0
        total = squares.sum()
        if not total > 0:  # all that is left are copies
            chosen.append(int(np.setdiff1d(np.arange(len(vectors)), chosen)[0]))
            continue
        drawn = generator.choice(len(vectors), trials, p=squares / total)
        left = np.minimum(squares[:, np.newaxis], squared_distances(vectors, drawn))
        best = int(np.argmin(left.sum(axis=0)))
        chosen.append(int(drawn[best]))
        squares = left[:, best]
    return vectors[chosen]


def squared_distances(vectors: Floats, numbers: Sequence[int] | Labels) -> Doubles:
    """Of every vector from some of them, `(T, len(numbers))`."""
    cosines = matmul(vectors, vectors[numbers].T).astype(np.float64)
    found: Doubles = np.maximum(2 - 2 * cosines, 0)
    return found
