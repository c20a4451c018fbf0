"""The command as a user's shell runs it: a process of its own, its output in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import moe_fast


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `moe-fast` with these arguments, in a wide terminal without colours."""
    command = [sys.executable, "-m", "moe_fast", *map(str, arguments)]
    package = str(Path(moe_fast.__file__).parents[1])  # the one under test, from any folder
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": package}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
