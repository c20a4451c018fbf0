"""The errors this package raises on purpose, and the checks that numbers go through."""

from __future__ import annotations

__all__ = ["CheckpointError", "MoeConfigError", "MoeFastError", "RecipeError", "RoutingError"]
MOST_SHOWN = 100


class MoeFastError(Exception):
    """Base of every error that `moe_fast` defines."""


class MoeConfigError(MoeFastError, ValueError):
    """A configuration or a plan that cannot be: the message names the argument and its value."""


class CheckpointError(MoeFastError, ValueError):
    """A checkpoint that cannot be read, combined or written.

    `problems` holds every reason found, one string each; the message shows the first hundred.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"{len(self.problems)} problems:"]
        lines += [f"  - {problem}" for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"  - and {len(self.problems) - MOST_SHOWN} more")
        return "\n".join(lines)


class RoutingError(MoeFastError, ValueError):
    """Logits that cannot be routed: of the wrong shape, or with a NaN; the message says where."""


class RecipeError(CheckpointError):
    """A recipe file that cannot be followed; each problem names the file, the line and the key."""
