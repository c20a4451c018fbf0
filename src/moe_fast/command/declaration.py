"""How the commands are declared: functions, whose annotations say what their options are.

Nothing here needs a parser. `parser.py` reads command lines that are right, and `application.py`
makes typer's commands of the same declarations, for help, completion and messages.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

from moe_fast.command.terminal import output

GROW, CHANGE, LOOK = "Grow an MoE", "Change an MoE", "Look at a model"


class Option:
    """An option, called as its parameter unless `names` are given; `on/off` names a flag's two."""

    def __init__(
        self,
        *names: str,
        help: str | Callable[[], str],
        metavar: str | None = None,
        show_default: str | bool = True,
        autocompletion: Callable[[], Sequence[str]] | None = None,
        min: int | None = None,
    ) -> None:
        self.names = names
        self.help = help
        self.metavar = metavar
        self.show_default = show_default
        self.autocompletion = autocompletion
        self.min = min


class Argument(Option):
    """An argument, which has no name on the command line but its place."""


class Parameter:
    """One argument or option of a command: where it stands, and what its text becomes."""

    def __init__(self, name: str, hint: Any, default: Any = ...) -> None:
        self.name = name
        self.type, self.declared = get_args(hint)  # of Annotated[type, Option(...)]
        self.default = default  # `...` if it must be given
        kinds = get_args(self.type) if get_origin(self.type) is types.UnionType else (self.type,)
        self.kind = next(kind for kind in kinds if kind is not types.NoneType)
        self.is_list = get_origin(self.kind) is list
        if self.is_list:
            (self.kind,) = get_args(self.kind)

    @property
    def metavar(self) -> str | None:
        metavar: str | None = self.declared.metavar
        return metavar

    @cached_property
    def opts(self) -> list[str]:
        """What stands on the command line; for an argument, its parameter's name."""
        if isinstance(self.declared, Argument):
            return [self.name]
        return [name.partition("/")[0] for name in self.declared.names or [self.spelled]]

    @cached_property
    def off_opts(self) -> list[str]:
        """What turns a flag off."""
        if self.kind is not bool:
            return []
        both = [name.partition("/")[2] for name in self.declared.names]
        return [name for name in both if name] if both else [f"--no-{self.spelled[2:]}"]

    @property
    def spelled(self) -> str:
        return "--" + self.name.replace("_", "-")


class Options:
    """Options that several commands have together: a subclass declares them as its attributes.

    A command gets them as one parameter, annotated with the subclass.
    """

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Command:
    """One command: the function that runs it, and what the help says of it."""

    def __init__(self, function: Callable[..., None], panel: str, help: str, epilog: str | None):
        self.function = function
        self.name = function.__name__
        self.panel = panel
        self.help = help
        self.epilog = epilog

    @cached_property
    def parameters(self) -> list[Parameter]:
        return [each for group in self._groups.values() for each in group]

    @cached_property
    def _groups(self) -> dict[str, list[Parameter]]:
        """What each parameter of the function gathers: itself, or the options of its class."""
        defaults = self.function.__kwdefaults__ or {}
        self._classes = {}
        groups = {}
        for name, hint in get_type_hints(self.function, include_extras=True).items():
            if name == "return" or hint is Call:
                continue
            if isinstance(hint, type) and issubclass(hint, Options):
                self._classes[name] = hint
                hints = get_type_hints(hint, include_extras=True)
                groups[name] = [Parameter(each, hints[each], getattr(hint, each)) for each in hints]
            else:
                groups[name] = [Parameter(name, hint, defaults.get(name, ...))]
        return groups

    def __call__(self, values: Mapping[str, Any], given: frozenset[str]) -> None:
        """Run it with the value of each parameter; `given` are those that the line names."""
        arguments: dict[str, Any] = {}
        for name, group in self._groups.items():
            if name in self._classes:
                arguments[name] = self._classes[name](**{p.name: values[p.name] for p in group})
            else:
                arguments[name] = values[name]
        before, output.quiet = output.quiet, bool(values.get("quiet"))
        try:
            self.function(Call(self, given), **arguments)
        finally:
            output.quiet = before


class Call:
    """A command that runs, and the names of the parameters that its line gives."""

    def __init__(self, command: Command, given: frozenset[str]) -> None:
        self.command = command
        self.given = given


COMMANDS: dict[str, Command] = {}


def command(
    panel: str, help: str, epilog: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes a `Call` first; `panel` is its part of the help."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[function.__name__] = Command(function, panel, help, epilog)
        return function

    return declare
