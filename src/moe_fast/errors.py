"""The errors that this package raises on purpose, and what each of them is about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moe_fast.wording import brief

__all__ = [
    "ArgumentTypeError",
    "CheckpointError",
    "MoeConfigError",
    "MoeFastError",
    "Problem",
    "RecipeError",
    "RoutingError",
]
MOST_LISTED = 100


class Problem(str):
    """One thing that is wrong, as a sentence that knows what it is about.

    Attributes
    ----------
    what : str
        What is wrong, without its subject: `"must be at least 1, got 0"`.
    argument : str or None
        The argument of a function that is wrong.
    file : Path or None
        The file or folder that is wrong.
    line : int or None
        The line of the file.
    tensor : str or None
        The tensor of the file, or of the folder, that is wrong.

    Examples
    --------
    >>> from moe_fast import Problem
    >>> Problem("must be at least 1, got 0", argument="threads")
    'threads must be at least 1, got 0'
    >>> problem = Problem("is missing", file="model.safetensors", tensor="lm_head.weight")
    >>> problem
    "model.safetensors: tensor 'lm_head.weight' is missing"
    >>> problem.tensor
    'lm_head.weight'
    """

    what: str
    argument: str | None
    file: Path | None
    line: int | None
    tensor: str | None

    def __new__(
        cls,
        what: str,
        *,
        argument: str | None = None,
        file: str | os.PathLike[str] | None = None,
        line: int | None = None,
        tensor: str | None = None,
    ) -> Problem:
        text = what if tensor is None else f"tensor {brief(tensor)} {what}"
        if argument is not None:
            text = f"{argument} {text}"
        if file is not None:
            text = f"{os.fspath(file)}{'' if line is None else f':{line}'}: {text}"
        problem = super().__new__(cls, text)
        problem.what = what
        problem.argument = argument
        problem.file = None if file is None else Path(file)
        problem.line = line
        problem.tensor = tensor
        return problem


class MoeFastError(Exception):
    """Base of every error that `moe_fast` defines.

    Attributes
    ----------
    problems : tuple of Problem
        Every reason that was found. The message shows the first hundred.
    """

    def __init__(
        self,
        *problems: str,
        argument: str | None = None,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
    ) -> None:
        self.problems = tuple(
            problem
            if isinstance(problem, Problem)
            else Problem(problem, argument=argument, file=file, tensor=tensor)
            for problem in problems
        )
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return list_problems(self.problems)

    @property
    def argument(self) -> str | None:
        """The name of the wrong argument, if there is one problem and it is about an argument."""
        return self.problems[0].argument if len(self.problems) == 1 else None

    @property
    def file(self) -> Path | None:
        """The file or folder that is wrong, if there is one problem and it is about a file."""
        return self.problems[0].file if len(self.problems) == 1 else None

    @property
    def tensor(self) -> str | None:
        """The tensor that is wrong, if there is one problem and it is about a tensor."""
        return self.problems[0].tensor if len(self.problems) == 1 else None


def list_problems(problems: Sequence[str]) -> str:
    """One problem as it is, several as a list."""
    if len(problems) == 1:
        return str(problems[0])
    lines = [f"{len(problems)} problems:"]
    lines += [f"  - {problem}" for problem in problems[:MOST_LISTED]]
    if len(problems) > MOST_LISTED:
        lines.append(f"  - and {len(problems) - MOST_LISTED} more")
    return "\n".join(lines)


class ArgumentTypeError(MoeFastError, TypeError):
    """An argument has the wrong type; the message names it, its value and the right type."""


class MoeConfigError(MoeFastError, ValueError):
    """An argument is out of range or not a known choice, or arguments exclude each other."""


class RoutingError(MoeFastError, ValueError):
    """Logits cannot be routed: they have the wrong shape, or a NaN; the message says where."""


class CheckpointError(MoeFastError, ValueError):
    """A file or checkpoint cannot be read, combined or written."""


class RecipeError(CheckpointError):
    """A recipe cannot be followed; each problem names the file, the line and the key."""
