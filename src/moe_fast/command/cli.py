"""`moe-fast`: all its commands. Each file declares its own when it is loaded."""

import os
from collections.abc import Sequence

from moe_fast.command import build_commands, inspection_commands, operation_commands
from moe_fast.command.declaration import COMMANDS, Call
from moe_fast.command.outcome import reported_errors
from moe_fast.command.parser import parse

__all__ = ["build_commands", "inspection_commands", "operation_commands", "run_command"]


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` ask for; by typer, where there is something to say first."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is not None and not asks_typer(arguments):
        with reported_errors(Call(command, frozenset())):
            values = parse(command, arguments[1:])
        if values is not None:
            defaults = {each.name: each.default for each in command.parameters}
            command(defaults | values, frozenset(values))
            return
    from moe_fast.command.application import application_for, use_readable_styles

    if not completes():
        use_readable_styles()
    application_for(arguments)()


def asks_typer(arguments: Sequence[str]) -> bool:
    """Whether the shell asks for completion, or Windows left patterns for the program to expand."""
    return completes() or (os.name == "nt" and any(set("*?[~$%") & set(a) for a in arguments))


def completes() -> bool:
    return any(name.endswith("_COMPLETE") for name in os.environ)
