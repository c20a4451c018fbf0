"""Random weights under the names that transformers 5.24 writes for each dense family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_families import write_model

FILE = Path(__file__).parent / "golden" / "dense_families.jsonl"
FAMILIES: dict[str, dict[str, Any]] = {
    entry["family"]: entry for entry in map(json.loads, FILE.read_text().splitlines())
}


def write_dense(
    folder: Path, family: str, *, seed: int = 0, dtype: Any = np.float32, **changes: Any
) -> dict[str, np.ndarray]:
    """Write a model of `family` with `changes` to its configuration; return its tensors."""
    entry = FAMILIES[family]
    generator = np.random.default_rng(seed)
    tensors = {
        name: generator.normal(size=shape).astype(dtype) for name, shape in entry["tensors"].items()
    }
    config = entry["config"] | changes
    if "rope_theta" in changes and "rope_theta" in config.get("rope_parameters", ()):
        theta = {"rope_theta": changes["rope_theta"]}
        config["rope_parameters"] = config["rope_parameters"] | theta
    tensors.pop("lm_head.weight", None)
    if not config["tie_word_embeddings"]:
        shape = (config["vocab_size"], config["hidden_size"])
        tensors["lm_head.weight"] = generator.normal(size=shape).astype(dtype)
    write_model(folder, tensors, config)
    return tensors
