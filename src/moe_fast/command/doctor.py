"""What is installed, which kernels run, and what is missing."""

from __future__ import annotations

import platform
import re
from importlib import metadata

import numpy as np

from moe_fast import kernels
from moe_fast.kernels.level import levels_available, levels_built
from moe_fast.records import dataclass
from moe_fast.reports import Report
from moe_fast.threads import default_threads

__all__ = ["Diagnosis", "Extra", "Package", "diagnose", "show_config"]
DISTRIBUTION = "moe-fast"
PURPOSES = {
    "align": "merging experts with their neurons aligned",
    "calibration": "running models on texts: scores of experts, routers",
    "checkpoint": "bfloat16 and float8 weights as arrays",
    "cli": "the command moe-fast",
    "hub": "models by their name on the Hugging Face Hub",
    "plot": "pictures of plans, loads and routers",
    "recipes": "recipe files, mergekit-moe's too",
}
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(?:>=\s*(?P<minimum>[\w.]+))?[^;]*"
    r"(?:;.*\bextra\s*==\s*['\"](?P<extra>[\w.-]+)['\"])?"
)


@dataclass(frozen=True)
class Package:
    """A package that an extra needs: the oldest version that will do, and the installed one."""

    name: str
    minimum: str | None
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed, and new enough."""
        if self.installed is None:
            return False
        return self.minimum is None or release_of(self.installed) >= release_of(self.minimum)


@dataclass(frozen=True)
class Extra:
    """An optional part: what it is for, and whether all its packages are installed."""

    name: str
    purpose: str
    packages: tuple[Package, ...]
    complete: bool
    install_command: str


@dataclass(frozen=True)
class Diagnosis(Report):
    """The state of this installation.

    Attributes
    ----------
    moe_fast, python, numpy, platform : str
        Versions of the package, of Python and of NumPy; the system and the processor.
    level : str
        The SIMD level in use.
    levels_built, levels_available : tuple of str
        The levels that this installation contains, and those that this processor can run.
    threads : int
        The default number of threads.
    extras : tuple
        The optional parts of the package, and whether their requirements are installed.
    problems : tuple of str
        What will go wrong or be slow.
    """

    moe_fast: str
    python: str
    numpy: str
    platform: str
    level: str
    levels_built: tuple[str, ...]
    levels_available: tuple[str, ...]
    threads: int
    extras: tuple[Extra, ...]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look for what is missing or slow in this installation.

    Returns
    -------
    Diagnosis

    Examples
    --------
    >>> from moe_fast import diagnose
    >>> diagnosis = diagnose()
    >>> diagnosis.level in diagnosis.levels_available
    True
    """
    problems = []
    if kernels.level_in_use != levels_available()[-1]:
        problems.append(
            f"the kernels run at level {kernels.level_in_use}, this processor could run "
            f"{levels_available()[-1]}; MOE_FAST_LEVEL forces the lower one"
        )
    return Diagnosis(
        moe_fast=metadata.version(DISTRIBUTION),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        numpy=np.__version__,
        platform=platform.platform(),
        level=kernels.level_in_use,
        levels_built=levels_built(),
        levels_available=levels_available(),
        threads=default_threads(),
        extras=find_extras(),
        problems=tuple(problems),
    )


def show_config() -> None:
    """Print the version, the SIMD level in use, the levels built in, threads, Python and NumPy.

    `MOE_FAST_LEVEL` forces a level and `MOE_FAST_NUM_THREADS` sets the default number of threads;
    each is read once.

    Examples
    --------
    >>> import moe_fast
    >>> moe_fast.show_config()  # doctest: +ELLIPSIS
    moe_fast: ...
    level: ...
    """
    found = diagnose()
    print(
        f"moe_fast: {found.moe_fast}",
        f"level: {found.level}",
        f"levels built in: {', '.join(found.levels_built)}",
        f"threads: {found.threads}",
        f"Python: {found.python} on {found.platform}",
        f"NumPy: {found.numpy}",
        sep="\n",
    )


def find_extras() -> tuple[Extra, ...]:
    """The extras that this distribution declares, each with what is installed of it."""
    packages: dict[str, list[Package]] = {}
    for requirement in metadata.requires(DISTRIBUTION) or ():
        match = REQUIREMENT.fullmatch(requirement)
        if match is None or match["extra"] is None or match["name"] == DISTRIBUTION:
            continue
        package = Package(match["name"], match["minimum"], find_version(match["name"]))
        packages.setdefault(match["extra"], []).append(package)
    return tuple(
        Extra(
            name,
            PURPOSES.get(name, ""),
            tuple(found),
            complete=all(package.fits for package in found),
            install_command=f"pip install '{DISTRIBUTION}[{name}]'",
        )
        for name, found in packages.items()
    )


def find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release_of(version: str) -> tuple[int, ...]:
    """The release segment of a version: `(1, 26, 4)` for `1.26.4rc1`."""
    return tuple(int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]
