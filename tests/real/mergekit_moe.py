"""The reference of recipes: mergekit-moe 0.1.5, run by the Python that MOE_FAST_MERGEKIT names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Importing what it needs takes many seconds, so that one process runs all recipes.
RUN_ALL = """
import os, sys
from mergekit.scripts.moe import main
options = ["--i-understand-this-is-not-useful-without-training", "--quiet"]
for folder in sys.argv[1:]:
    os.chdir(folder)
    main(["recipe.yml", "mergekit", *options], standalone_mode=False)
"""


def build_with_mergekit(recipe: str | dict[str, Any], folder: Path) -> Path:
    """What mergekit-moe builds from a recipe (JSON is YAML)."""
    build_all_with_mergekit({folder: recipe})
    return folder / "mergekit"


def build_all_with_mergekit(recipes: Mapping[Path, str | dict[str, Any]]) -> None:
    """What mergekit-moe builds from each recipe in its folder, as `mergekit` beside the recipe."""
    python = os.environ.get("MOE_FAST_MERGEKIT")
    assert python, "MOE_FAST_MERGEKIT must name a Python with mergekit 0.1.5"
    for folder, recipe in recipes.items():
        text = recipe if isinstance(recipe, str) else json.dumps(recipe)
        (folder / "recipe.yml").write_text(text, encoding="utf-8")
    subprocess.run(
        [python, "-c", RUN_ALL, *map(str, recipes)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
        timeout=1800,
    )
