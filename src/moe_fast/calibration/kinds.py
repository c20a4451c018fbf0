"""Rows of a router that tell kinds of text apart, one row a kind.

`inputs` are what the router reads of the tokens of each kind, one array `(T, H)` a kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.clustering import unit_rows
from moe_fast.matmul import matmul

Floats = npt.NDArray[np.float32]
PENALTY = 1e-2


def ridge_rows(inputs: Sequence[Floats], penalty: float = PENALTY) -> Floats:
    """Ridge regression from router inputs to the kind, each row scaled to length 1.

    `W = (X^T X + penalty I)^-1 X^T Y`, the rows of Y being 1 in the column of a token's kind. It is
    solved without a column of ones: routers have no bias (DUME, arXiv 2603.29765).
    """
    width = inputs[0].shape[1]
    gram = penalty * np.eye(width)
    sums = np.empty((len(inputs), width))
    for number, read in enumerate(inputs):
        wide = read.astype(np.float64)
        gram += matmul(wide.T, wide)
        sums[number] = wide.sum(axis=0)
    return unit_rows(np.linalg.solve(gram, sums.T).T)


def mean_rows(inputs: Sequence[Floats]) -> Floats:
    """The mean input of each kind, less the mean of these means."""
    means = np.stack([read.mean(axis=0, dtype=np.float64) for read in inputs])
    rows: Floats = (means - means.mean(axis=0)).astype(np.float32)
    return rows
