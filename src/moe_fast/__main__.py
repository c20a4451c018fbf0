"""`moe-fast` and `python -m moe_fast`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from moe_fast.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"moe-fast: the command needs {error.name}: pip install 'moe-fast[checkpoint,cli]'"
        )
    app()


if __name__ == "__main__":
    main()
