"""The reference of recipes: mergekit-moe 0.1.5, run by the Python that MOE_FAST_MERGEKIT names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def build_with_mergekit(recipe: str | dict[str, Any], folder: Path) -> Path:
    """What mergekit-moe builds from a recipe (JSON is YAML)."""
    python = os.environ.get("MOE_FAST_MERGEKIT")
    assert python, "MOE_FAST_MERGEKIT must name a Python with mergekit 0.1.5"
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    (folder / "recipe.yml").write_text(text, encoding="utf-8")
    subprocess.run(
        [
            python, "-m", "mergekit.scripts.moe", "recipe.yml", "mergekit",
            "--i-understand-this-is-not-useful-without-training", "--quiet",
        ],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
        timeout=1800,
    )  # fmt: skip
    return folder / "mergekit"
