"""Standard output and standard error: how wide they are, and whether they show colours.

rich draws tables whose cells are folded, and bars. It takes as long to load as NumPy, so lines of
text do without it; what a terminal is, both see in the same way.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TextIO

# Of the colours that terminals name, yellow, cyan and white cannot be read on a light background,
# and blue not on a dark one.
STYLES = {"bold": "1", "red": "31", "green": "32", "magenta": "35"}
NO_LIMIT = 10_000  # characters of a line: nothing is wrapped in a file or a pipe


class Output:
    """One of the two streams, by its name in `sys`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.quiet = False

    @property
    def stream(self) -> TextIO:
        stream: TextIO = getattr(sys, self.name)
        return stream

    @cached_property
    def is_terminal(self) -> bool:
        forced = os.environ.get("FORCE_COLOR")
        return bool(forced) if forced is not None else self.stream.isatty()

    @cached_property
    def width(self) -> int:
        return shutil.get_terminal_size().columns if self.is_terminal else NO_LIMIT

    @cached_property
    def has_styles(self) -> bool:
        if not self.is_terminal or os.environ.get("NO_COLOR"):
            return False
        if os.name == "nt":  # Windows understands the codes below once a shell has run
            os.system("")
        return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")

    @cached_property
    def console(self) -> Any:
        """The same of rich."""
        from rich.console import Console
        from rich.theme import Theme

        numbers = ("download", "data.speed", "remaining")
        theme = Theme({f"progress.{name}": "none" for name in numbers})
        return Console(stderr=self.name == "stderr", width=self.width, theme=theme)

    def print(
        self,
        text: str,
        *,
        indent: int | None = None,
        style: str = "",
        label: tuple[int, str] = (0, ""),
    ) -> None:
        """Print text in lines that fit, broken between words.

        What goes on in a second line stands `indent` columns to the right, by default two more than
        its first line. `label` is a number of characters at the beginning and their style.
        """
        for line in text.split("\n"):
            hanging = len(line) - len(line.lstrip()) + 2 if indent is None else indent
            folded = textwrap.fill(
                line,
                # A terminal that is too narrow for the indent breaks lines itself.
                max(self.width, hanging + 20),
                subsequent_indent=" " * hanging,
                break_long_words=False,
                break_on_hyphens=False,
            )
            self.write(folded, style=style, label=label)

    def write(self, line: str, *, style: str = "", label: tuple[int, str] = (0, "")) -> None:
        """Print a line as it is."""
        if self.quiet:
            return
        if self.has_styles:
            length, other = label
            line = styled(line[:length], other) + styled(line[length:], style)
        self.stream.write(line + "\n")

    def print_table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table whose cells are folded where they do not fit."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        if not self.quiet:
            self.stream.flush()
            self.console.print(table)


def styled(text: str, style: str) -> str:
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if text and style else text


output = Output("stdout")
error_output = Output("stderr")
