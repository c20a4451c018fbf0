"""The command as a whole: its name, its version, how all its commands are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import moe_fast

GROW, CHANGE, LOOK = "Grow an MoE", "Change an MoE", "Look at a model"


class PlainFlags:
    """Shows flags without the `<bool>` that reads as if a value were needed."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Group(PlainFlags, TyperGroup):
    """All commands."""


class Command(PlainFlags, TyperCommand):
    """One command. If its output is missing, it may stand where mergekit has it: last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if getattr(error.param, "name", None) == "output" and len(given) > 1:
                error.message = f"Did you mean -o {given[-1]}?"
            raise


app = typer.Typer(
    name="moe-fast",
    cls=Group,
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Grow a Mixture-of-Experts model out of dense models on disk: plan it, build it, check "
    "it, look into it. Start with `moe-fast demo`, which makes two small models to play with; then "
    "`moe-fast build MODEL... -o OUTPUT`, and `moe-fast COMMAND --help` for the rest.",
)


def command_for(arguments: Sequence[str]) -> typer.Typer:
    """The command with the parser of the subcommand that `arguments` begin with, or with all.

    To make the others' takes a fifth of the start.
    """
    named = [
        each
        for each in app.registered_commands
        if each.callback is not None and [each.name or each.callback.__name__] == arguments[:1]
    ]
    if not named:
        return app
    one = copy(app)
    one.registered_commands = named
    return one


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe-fast {moe_fast.__version__}")
        raise typer.Exit


@app.callback()
def commands(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    pass
