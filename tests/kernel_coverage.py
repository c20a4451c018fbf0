"""Which lines of the kernels' definitions have run, at any level, by what gcov counted.

    python tests/kernel_coverage.py FOLDER    (of the .gcda files; run where the sources lie)

gcov counts lines of the generated C. Above what it makes of a line, Cython writes a comment with
the line's place, and blocks of C it copies as they are: so each line of C leads to a definition.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path("src/moe_fast/kernels")
PLACE = re.compile(r'\s*/\* "(.+\.pxi)":(\d+)$')
C_BLOCK = re.compile(r'(?<=cdef extern from \*:\n    """\n).*?(?=    """\n)', re.DOTALL)

Lines = dict[int, tuple[str, int]]


def origins(generated: str) -> Lines:
    """Where each line of the generated C comes from, for those that have an origin."""
    result: Lines = {}
    for definitions in KERNELS.glob("*.pxi"):
        text = definitions.read_text()
        for block in C_BLOCK.finditer(text):
            there = generated.find(block[0])
            if there < 0:  # of another module; or with macros, whose lines Cython joins
                continue
            here, there = text.count("\n", 0, block.start()), generated.count("\n", 0, there)
            for i in range(block[0].count("\n")):
                result[there + i + 1] = str(definitions), here + i + 1
    place = None
    for number, line in enumerate(generated.splitlines(), 1):
        if match := PLACE.match(line):
            place = match[1], int(match[2])
        elif line.startswith("}"):
            place = None  # what follows a function is Cython's own
        elif place is not None and number not in result:
            result[number] = place
    return result


def counted(data: Path) -> Iterator[tuple[int, int]]:
    """The lines of the generated C that can run, and how often they have."""
    command = ["gcov", "--json-format", "--stdout", "--object-directory", data, data]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for report in map(json.loads, printed.splitlines()):
        for file in report["files"]:
            if Path(file["file"]).name == data.with_suffix(".c").name:
                yield from ((line["line_number"], line["count"]) for line in file["lines"])


def main(folder: Path) -> None:
    runs: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(folder.glob("_*.gcda")):
        origin = origins((KERNELS / data.name).with_suffix(".c").read_text())
        for number, count in counted(data):
            if number in origin:
                file, line = origin[number]
                runs[file][line] += count
    for file, lines in sorted(runs.items()):
        report(file, lines)
    report("all kernels", dict(enumerate(n for lines in runs.values() for n in lines.values())))


def report(name: str, lines: dict[int, int]) -> None:
    missed = [line for line, count in sorted(lines.items()) if count == 0]
    listed = ", ".join(map(str, missed)) if name.endswith(".pxi") else f"{len(missed)} lines"
    share = 100 * (1 - len(missed) / len(lines))
    print(f"{name:<45} {len(lines):>5} lines  {share:5.1f} %  {listed if missed else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
