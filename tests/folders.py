"""Model folders on disk: what is in them, and changes to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the weights anew; sizes and headers are then no longer those of a manifest."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def convert(folder: Path, dtype: Any) -> None:
    """All weights in another dtype."""
    rewrite(folder, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; `"absent"` removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v != "absent"}))


def edit_config(folder: Path, **changes: object) -> None:
    edit_json(folder / "config.json", **changes)
