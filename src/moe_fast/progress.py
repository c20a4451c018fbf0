"""How far a long piece of work has come: what the argument `progress` may be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from moe_fast.errors import ArgumentTypeError, MoeConfigError

__all__ = ["Progress", "ShowsProgress", "as_progress"]

ShowsProgress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes to do in all."""
Progress = ShowsProgress | bool


def as_progress(progress: Progress | None, task: str) -> ShowsProgress | None:
    """The argument `progress` as a function, or `None`; `True` is a bar with the name of the task.

    Raises
    ------
    ArgumentTypeError
        For what is neither callable nor a bool.
    MoeConfigError
        For `True`, if neither tqdm nor rich is installed.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return make_bar(task)
    if not callable(progress):
        raise ArgumentTypeError(
            f"must be True or a function of two integers, got {progress!r}", argument="progress"
        )
    return progress


def make_bar(task: str) -> ShowsProgress:
    """A bar of tqdm, in a notebook one of its widgets; of rich where there is no tqdm."""
    for module, bar in (("tqdm.auto", TqdmBar), ("rich.progress", RichBar)):
        try:
            return bar(import_module(module), task)
        except ModuleNotFoundError:
            continue
    raise MoeConfigError(
        "needs tqdm or rich to show a bar: pip install tqdm, or pass a function of two integers",
        argument="progress",
    )


class TqdmBar:
    def __init__(self, tqdm: Any, task: str) -> None:
        self.make, self.task = tqdm.tqdm, task
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = self.make(total=total, desc=self.task, unit="B", unit_scale=True)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


class RichBar:
    def __init__(self, rich: Any, task: str) -> None:
        self.bar = rich.Progress(*rich.Progress.get_default_columns(), rich.DownloadColumn())
        self.number = self.bar.add_task(task, total=None)

    def __call__(self, done: int, total: int) -> None:
        if not self.bar.finished:
            self.bar.start()
        self.bar.update(self.number, completed=done, total=total)
        if done >= total:
            self.bar.stop()
