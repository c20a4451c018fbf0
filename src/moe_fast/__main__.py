"""`moe-fast` and `python -m moe_fast`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    try:
        run()
    except KeyboardInterrupt:  # commands report their own: this is one while modules are loaded
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run() -> None:
    try:
        from moe_fast.command.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"moe-fast: the command needs {error.name}: pip install 'moe-fast[checkpoint,cli]'"
        )
    try:
        app()
        sys.stdout.flush()
    except OSError as error:  # commands report their own: this is a full disk behind a `>`
        # Or the interpreter tries the rest again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: standard output: {error.strerror}")


if __name__ == "__main__":
    main()
