"""What scores of experts are called, and what tells the model that they are of from others."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from moe_fast.models.inspection import read_floats
from moe_fast.models.moe import MoeModel, is_mtp
from moe_fast.storage.files import OpenFiles

MEASURES = ("frequency", "reap", "ean_sum", "ean_mean")
ROWS = 2  # of each router, which are read to tell models apart


def digest_routers(model: MoeModel) -> str:
    """SHA-256 of the first rows of all routers, as float32, and of the number of their experts.

    It is the same for another layout of the same model, and for a dtype that holds its numbers.
    """
    digest = sha256()
    with OpenFiles() as files:
        for layer in model.layers:
            if is_mtp(layer) or layer.router is None:
                continue
            digest.update(f"{layer.key} {len(layer.experts)} ".encode())
            rows = read_floats(layer.router.rows(0, min(ROWS, len(layer.experts))), files)
            if rows is not None:
                digest.update(np.ascontiguousarray(rows, "<f4").data)
    return digest.hexdigest()
