"""What the command calls the arguments of the functions that it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_fast.errors import Problem

__all__ = ["in_options", "is_about_option", "option_names"]
# Where the command and Python differ: Python's name of an argument, and the command's.
CALLED = {
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "n_group": "groups",
    "norm_topk_prob": "norm",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "num_layers": "layers",
    "num_models": "models",
    "routing_method": "method",
    "texts": "text",
    "topk_group": "groups_per_token",
}


def option_names(parameters: Iterable[Any], called: Mapping[str, str]) -> dict[str, str]:
    """What users write for each argument, such as `--experts` for `num_experts`.

    `parameters` are those of one command. `called` has more names that differ there, as `CALLED`
    has those that differ everywhere.
    """
    options = {
        each.name: each.opts[0] if each.opts[0].startswith("-") else each.metavar
        for each in parameters
    }
    differing = {**CALLED, **called}
    return options | {
        argument: options[name] for argument, name in differing.items() if name in options
    }


def is_about_option(problem: Problem, options: Mapping[str, str]) -> bool:
    """Whether the value of an option is what is wrong, and not what is in a file."""
    return problem.argument in options and problem.file is None


def in_options(problem: Problem, options: Mapping[str, str]) -> Problem:
    """A problem with an option, called as users write it; any other as it is."""
    if problem.argument is None or not is_about_option(problem, options):
        return problem
    return Problem(problem.what, argument=options[problem.argument])
