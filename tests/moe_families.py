"""Random weights under the names that transformers 5.24 writes for each family of MoEs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "golden" / "moe_families.jsonl"
FAMILIES: dict[str, dict[str, Any]] = {
    entry["family"]: entry for entry in map(json.loads, FILE.read_text().splitlines())
}
NUM_EXPERTS = 6
# Families whose experts can be looked at and not operated on.
NOT_OPERATED_ON = ("jetmoe", "longcat_flash")
OPERATED_ON = [family for family in FAMILIES if family not in NOT_OPERATED_ON]


def write_moe(
    folder: Path, family: str, dtype: Any = np.float32, **changes: Any
) -> dict[str, np.ndarray]:
    """Write a model of `family` with `changes` to its configuration; return its tensors."""
    entry = FAMILIES[family]
    generator = np.random.default_rng(len(family))
    tensors = {
        name: generator.normal(size=shape).astype(dtype) for name, shape in entry["tensors"].items()
    }
    write_model(folder, tensors, entry["config"] | changes)
    return tensors


def write_model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
