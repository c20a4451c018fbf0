"""Tiny dense models of the families with names or tensors of their own, as transformers makes them.

`python tests/real/dense_models.py FILE` writes what `save_pretrained` makes of each: its
config.json and the shape of every tensor, one family a line (tests/golden/dense_families.jsonl).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from random_models import save_random_model

HEADS = {"head_dim": 12}
# What each family's smallest model needs besides the sizes of all.
FAMILIES: dict[str, dict[str, Any]] = {
    "cwm": HEADS,
    "ernie4_5": HEADS,
    "exaone": {},
    "glm": HEADS,
    "granite_swa": {},
    "helium": HEADS,
    "internlm3": HEADS,
    "iquestcoder": HEADS,
    "olmo3": {},
    "phi3": {},
    "seed_oss": HEADS,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def written(family: str) -> dict[str, Any]:
    """What `save_pretrained` writes of a family."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), family, **FAMILIES[family])
        config = json.loads((Path(folder) / "config.json").read_text())
        del config["transformers_version"]
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return {"family": family, "config": config, "tensors": shapes}


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as output:
        for each in FAMILIES:
            output.write(json.dumps(written(each)) + "\n")
