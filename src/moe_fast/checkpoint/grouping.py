"""Which experts to merge: the grouping of REAM (2604.04356), from scores and similarities.

The experts of the greatest scores are the centroids. From the greatest score on, each takes the
nearest experts that are not taken yet, at most 16; those that are left over join the nearest
centroid. Two experts are as far apart as `1 - ((1 + cos m) / 2 + (1 + cos g) / 2) / 2`, with cos m
the cosine of their mean outputs and cos g that of their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.arrangement import Group
from moe_fast.matmul import matmul

Doubles = npt.NDArray[np.float64]
MOST_MEMBERS = 16  # that a centroid takes before the others have taken theirs


def distances(mean_outputs: Doubles, gate_similarity: Doubles) -> Doubles:
    """How far each two experts are apart, from 0 to 1, `(E, E)`.

    Parameters
    ----------
    mean_outputs : ndarray
        `(E, width)`.
    gate_similarity : ndarray
        The cosine of the logits of each two, `(E, E)`.
    """
    norms = np.linalg.norm(mean_outputs, axis=1)
    unit = mean_outputs / np.where(norms > 0, norms, 1)[:, np.newaxis]
    similarity = ((1 + matmul(unit, unit.T)) / 2 + (1 + gate_similarity) / 2) / 2
    return np.asarray(1 - similarity, np.float64)


def group_experts(
    scores: Doubles, apart: Doubles, centroids: Sequence[int], most: int = MOST_MEMBERS
) -> list[Group]:
    """Each centroid with the experts that join it, weighted by their scores.

    The groups stand in the order of their centroids. Of equal scores, and of equal
    distances, the expert with the lower number comes first.
    """
    free = sorted(set(range(len(scores))) - set(centroids))
    members: dict[int, list[int]] = {centroid: [] for centroid in centroids}
    for centroid in sorted(centroids, key=lambda c: (-scores[c], c)):
        nearest = sorted(free, key=lambda e: (apart[centroid, e], e))[:most]
        members[centroid] += nearest
        free = [expert for expert in free if expert not in nearest]
    for expert in free:
        members[min(centroids, key=lambda c: (apart[c, expert], c))].append(expert)
    groups = []
    for centroid in sorted(centroids):
        experts = (centroid, *sorted(members[centroid]))
        weights = tuple(float(scores[expert]) for expert in experts)
        groups.append(Group(experts, weights if sum(weights) > 0 else ()))
    return groups
