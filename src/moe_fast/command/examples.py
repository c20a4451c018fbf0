"""The example scripts: a wheel has them inside, a checkout beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_fast.errors import CheckpointError
from moe_fast.single_file import check_place, whole_file

PLACES = (Path(__file__).parents[1] / "examples", Path(__file__).parents[3] / "examples")


def copy_examples(folder: Path) -> Iterator[Path]:
    """Copy each script into `folder` and give its path; files that are there stay.

    Raises
    ------
    CheckpointError
        For a file that is there already and differs, or a place that cannot be written.
    """
    place = next(filter(Path.is_dir, PLACES))
    files = sorted(file for file in place.iterdir() if file.suffix in (".py", ".yml"))
    for file in files:
        copy = folder / file.name
        check_place(copy, overwrite=True)
        if copy.exists() and copy.read_bytes() != file.read_bytes():
            raise CheckpointError("differs from the example; choose another folder", file=copy)
    for file in files:
        with whole_file(folder / file.name) as stream:
            stream.write(file.read_bytes())
        yield folder / file.name
