"""How sharp a router's logits are: the standard deviation over the experts of a token's logits."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moe_fast.errors import MoeConfigError
from moe_fast.matmul import matmul

__all__ = ["measure_logit_std", "sharpen"]
Rows = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def centre(rows: Rows) -> npt.NDArray[np.float64]:
    """The rows of a router, `(E, H)`, without their mean, which moves a token's logits alike."""
    wide = rows.astype(np.float64)
    shared: npt.NDArray[np.float64] = wide.sum(axis=0) / len(wide)
    return wide - shared


def measure_logit_std(rows: Rows, inputs: npt.NDArray[np.float32] | None = None) -> float:
    """The standard deviation over the experts of a token's logits, root mean square over tokens.

    Parameters
    ----------
    rows : ndarray, shape (E, H)
        The router.
    inputs : ndarray, shape (T, H), optional
        What it reads of some tokens. By default every token is standard normal: the expectation
        over such tokens, whose sums are taken in an order that no processor changes.
    """
    centred = centre(rows)
    if inputs is not None:
        logits = matmul(inputs, centred.astype(np.float32).T)
        return math.sqrt(float(np.square(logits, dtype=np.float64).mean()))
    squares = np.square(centred).sum(axis=0)
    return math.sqrt(math.fsum(squares.tolist()) / len(centred))


def sharpen(
    rows: Rows, logit_std: float, inputs: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """The rows without what they share, times the factor that makes them so sharp.

    Raises
    ------
    MoeConfigError
        Rows that are all alike: no factor tells them apart.
    """
    centred = centre(rows)
    found = measure_logit_std(centred, inputs)
    if not found > 0:
        raise MoeConfigError(
            f"cannot be given to routers whose {len(rows)} rows are all alike",
            argument="logit_std",
        )
    return (centred * (logit_std / found)).astype(np.float32)
