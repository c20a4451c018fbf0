"""Runs the code in a page of the documentation, as a reader would: from top to bottom.

Fenced blocks of these languages run, one after the other, in one folder:

- `python`, all of a page in one namespace; `pycon`, the same with prompts and their output;
- `bash`, where `moe-fast` and `python` are this environment's and `pip` does nothing.

A `text` block right after one of them is what it prints, `...` standing for anything. A comment
`<!-- not run: why -->` right before a block excepts it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import moe_fast

FENCED = re.compile(
    r"(?P<excepted><!-- not run: [^\n]+ -->\s*)?"
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)(?P<options>[^\n`]*)\n"
    r"(?P<code>.*?)"
    r"^ *(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("python", "pycon", "bash")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
COMMANDS = (
    'moe-fast() { "$PYTHON" -m moe_fast "$@"; }; python() { "$PYTHON" "$@"; }; pip() { :; }\n'
)


@dataclass(frozen=True)
class Block:
    """One block to run, and what it should print, where the page says so."""

    place: str
    line: int
    language: str
    code: str
    output: str | None


class Differs(AssertionError):
    """A block printed something else than the page says."""


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that run, in order."""
    text = page.read_text(encoding="utf-8")
    for match, after in pairwise([*FENCED.finditer(text), None]):
        if match is None or match["language"] not in RUN or match["excepted"]:
            continue
        output = None
        if after and after["language"] == "text" and not text[match.end() : after.start()].strip():
            output = textwrap.dedent(after["code"])
        line = text.count("\n", 0, match.start("code"))
        code = textwrap.dedent(match["code"])
        yield Block(f"{page.name}:{line + 1}", line, match["language"], code, output)


def run_page(page: Path) -> int:
    """Run the blocks of a page in the current folder; how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        count += 1
        if block.language == "pycon":
            run_prompts(block, namespace)
            continue
        printed = run_shell(block) if block.language == "bash" else run_python(block, namespace)
        if block.output is not None and not doctest.OutputChecker().check_output(
            block.output, printed, FLAGS
        ):
            raise Differs(f"{block.place} prints\n{printed}\nwhere the page has\n{block.output}")
    return count


def run_python(block: Block, namespace: dict[str, object]) -> str:
    printed = io.StringIO()
    # Blank lines in front, so that tracebacks have the page's line numbers.
    source = compile("\n" * block.line + block.code, block.place, "exec")
    with contextlib.redirect_stdout(printed):
        exec(source, namespace)
    return printed.getvalue()


def run_prompts(block: Block, namespace: dict[str, object]) -> None:
    test = doctest.DocTestParser().get_doctest(
        block.code, namespace, block.place, block.place, block.line
    )
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=report.write, clear_globs=False)
    if runner.failures:
        raise Differs(report.getvalue())
    namespace.update(test.globs)


def run_shell(block: Block) -> str:
    package = str(Path(moe_fast.__file__).parents[1])  # the one under test, from any folder
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", COMMANDS + block.code],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": package, "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Differs(f"{block.place} ends with exit code {done.returncode}\n{done.stderr}")
    return done.stdout
