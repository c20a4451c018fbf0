"""The command as a user's shell runs it: a process of its own, its output in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `moe-fast` with these arguments, in a wide terminal without colours."""
    command = [sys.executable, "-m", "moe_fast", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
