"""What is published leads back to the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github" / "set_address.py"
ADDRESS = "https://example.org/owner/moe_fast"

if not SCRIPT.exists():
    pytest.skip("the workflows do not lie beside the tests", allow_module_level=True)


def test_links_are_absolute_and_lead_to_files_that_are_there(tmp_path):
    for name in ("README.md", "pyproject.toml", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, SCRIPT, f"{ADDRESS}/"], cwd=tmp_path, check=True)
    readme = (tmp_path / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (\S+)", readme, re.MULTILINE)
    targets = [first or second for first, second in links]
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://"), target
        kind, found, path = target.removeprefix(f"{ADDRESS}/").partition("/main/")
        if found:
            assert (ROOT / path.partition("#")[0]).is_file(), target
            assert (kind == "raw") == path.endswith((".png", ".svg"))
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    assert urls["Homepage"] == ADDRESS
    assert all(url.startswith(ADDRESS) for url in urls.values())
    assert f"repo_url: {ADDRESS}\n" in (tmp_path / "mkdocs.yml").read_text("utf-8")
