"""What this package needs of its surroundings."""

from __future__ import annotations

import re

OLDEST_NUMPY = (1, 26)


def require_numpy() -> None:
    """Raise `ImportError` if the NumPy that is installed is too old."""
    import numpy

    found = re.match(r"(\d+)\.(\d+)", numpy.__version__)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST_NUMPY:
        raise ImportError(
            f"moe_fast needs NumPy {'.'.join(map(str, OLDEST_NUMPY))} or later, this is "
            f"{numpy.__version__}: pip install --upgrade numpy",
            name="numpy",
        )
