"""Which lines of the kernels' definitions have run, at any level, by what gcov counted.

    python tests/kernel_coverage.py FOLDER    (of the .gcda files; run where the sources lie)

gcov counts lines of C: those of the headers, and those that Cython generated. Above what it makes
of a line, Cython writes a comment with the line's place.
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

Place = tuple[str, int]


def origins(generated: str) -> dict[int, Place]:
    """Where each line of the generated C comes from, for those that have an origin."""
    result: dict[int, Place] = {}
    place = None
    for number, line in enumerate(generated.splitlines(), 1):
        if match := PLACE.match(line):
            place = match[1], int(match[2])
        elif line.startswith("}"):
            place = None  # what follows a function is Cython's own
        elif place is not None:
            result[number] = place
    return result


def counted(data: Path) -> Iterator[tuple[Place, int]]:
    """The lines of the definitions that can run, and how often they have."""
    generated = (KERNELS / data.name).with_suffix(".c")
    origin = origins(generated.read_text())
    command = ["gcov", "--json-format", "--stdout", "--object-directory", data, data]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for report in map(json.loads, printed.splitlines()):
        for file in report["files"]:
            path = Path(file["file"])
            for line in file["lines"]:
                number, count = line["line_number"], line["count"]
                if path.parts[-2:-1] == ("c",) and path.suffix == ".h":
                    yield (str(KERNELS / "c" / path.name), number), count
                elif path.name == generated.name and number in origin:
                    yield origin[number], count


def main(folder: Path) -> None:
    runs: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(folder.glob("_*.gcda")):
        for (file, line), count in counted(data):
            runs[file][line] += count
    for file, lines in sorted(runs.items()):
        report(file, lines)
    report("all kernels", dict(enumerate(n for lines in runs.values() for n in lines.values())))


def report(name: str, lines: dict[int, int]) -> None:
    missed = [line for line, count in sorted(lines.items()) if count == 0]
    listed = f"{len(missed)} lines" if name == "all kernels" else ", ".join(map(str, missed))
    share = 100 * (1 - len(missed) / len(lines))
    print(f"{name:<45} {len(lines):>5} lines  {share:5.1f} %  {listed if missed else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
