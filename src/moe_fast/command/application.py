"""The command as typer has it: its help, its completion, and what it says of wrong lines."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import moe_fast
from moe_fast.command.declaration import (
    COMMANDS,
    Argument,
    Command,
    Parameter,
)

# typer's own colours are cyan and yellow, which cannot be read on a light background. Its versions
# name them differently.
STYLES_OF_HELP = {
    "STYLE_COMMANDS_TABLE_FIRST_COLUMN": "bold",
    "STYLE_METAVAR": "",
    "STYLE_METAVAR_APPEND": "dim",
    "STYLE_NEGATIVE_OPTION": "bold",
    "STYLE_NEGATIVE_SWITCH": "bold",
    "STYLE_OPTION": "bold",
    "STYLE_OPTION_ENVVAR": "dim",
    "STYLE_SWITCH": "bold",
    "STYLE_TYPES": "",
    "STYLE_USAGE": "",
}


class PlainFlags:
    """Shows flags without the `<bool>` that reads as if a value were needed."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class GroupOfCommands(PlainFlags, TyperGroup):
    """All commands."""


class OneCommand(PlainFlags, TyperCommand):
    """One command. If its output is missing, it may stand where mergekit has it: last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if getattr(error.param, "name", None) == "output":
                places = [
                    word
                    for before, word in pairwise(given)
                    if not word.startswith("-") and not before.startswith("-")
                ]
                if places:  # the last word that is no option's value
                    error.message = f"Did you mean -o {places[-1]}?"
            raise


def make_application(commands: Iterable[Command]) -> typer.Typer:
    """The application with some of the commands."""
    made = typer.Typer(
        name="moe-fast",
        cls=GroupOfCommands,
        context_settings={"help_option_names": ["--help", "-h"]},
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Grow a Mixture-of-Experts model out of dense models on disk, check it, and prune, "
        "merge or convert any MoE. `moe-fast demo` makes two small models to try it on; then run "
        "`moe-fast build MODEL... -o OUTPUT`. `moe-fast COMMAND --help` shows a command's options.",
    )
    made.callback()(version)
    for each in commands:
        made.command(
            each.name,
            cls=OneCommand,
            rich_help_panel=each.panel,
            help=each.help,
            epilog=each.epilog,
        )(callback_of(each))
    return made


def callback_of(command: Command) -> Any:
    """A function with the signature that typer reads, which runs the command."""

    def run(context: typer.Context, **values: Any) -> None:
        sources = {name: context.get_parameter_source(name) for name in values}
        given = {n for n, source in sources.items() if source and source.name != "DEFAULT"}
        command(values, frozenset(given))

    parameters = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    ]
    for each in command.parameters:
        default = inspect.Parameter.empty if each.default is ... else each.default
        parameters.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[each.type, declare(each)],
            )
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def declare(parameter: Parameter) -> Any:
    """An argument or option in typer's words."""
    declared = parameter.declared
    return (typer.Argument if isinstance(declared, Argument) else typer.Option)(
        *declared.names,
        help=declared.help if isinstance(declared.help, str) else declared.help(),
        metavar=declared.metavar,
        show_default=declared.show_default,
        autocompletion=declared.autocompletion,
        min=declared.min,
    )


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe-fast {moe_fast.__version__}")
        raise typer.Exit


def version(
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


def use_readable_styles() -> None:
    """Set the styles of help and of errors; this loads rich, which completion does without."""
    from typer import rich_utils

    for name, style in STYLES_OF_HELP.items():
        setattr(rich_utils, name, style)


def application_for(arguments: Sequence[str]) -> typer.Typer:
    """The application with the subcommand that `arguments` begin with, or with all.

    To make the others' parsers takes time.
    """
    named = COMMANDS.get(arguments[0]) if arguments else None
    return make_application(COMMANDS.values() if named is None else [named])
