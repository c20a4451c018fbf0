"""Products of matrices, quietly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def matmul(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`left @ right`, without warnings.

    On Apple silicon, NumPy warns of divisions by zero and of overflow in the product of any finite
    matrices (numpy/numpy issue 28687). The numbers are right.
    """
    with np.errstate(all="ignore"):
        product: npt.NDArray[Any] = left @ right
    return product
