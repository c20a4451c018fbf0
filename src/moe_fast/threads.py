"""Work shared among threads, from the one pool of the package."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_fast.checks import as_index
from moe_fast.errors import MoeConfigError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

ENVIRONMENT_VARIABLE = "MOE_FAST_NUM_THREADS"
# No processor has more; the pool starts a thread only when one is needed.
MOST_THREADS = 1024


@functools.cache
def default_threads() -> int:
    """The value of `MOE_FAST_NUM_THREADS` when it is first needed, or 1."""
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if not (value.isdecimal() and 1 <= int(value) <= MOST_THREADS):
        raise MoeConfigError(
            f"must be an integer from 1 to {MOST_THREADS}, got {value!r}",
            argument=ENVIRONMENT_VARIABLE,
        )
    return int(value)


def as_threads(threads: int | None) -> int:
    """The argument `threads` as a number of threads; `None` is the environment's default."""
    if threads is None:
        return default_threads()
    return as_index(threads, "threads", minimum=1, maximum=MOST_THREADS)


@functools.cache
def pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="moe_fast")


# Threads do not come along into a forked child: it makes its own pool.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def share(work: Callable[[int, int], object], size: int, threads: int, *, grain: int = 1) -> None:
    """Call `work(start, stop)` for parts of `range(size)`, one part a thread.

    The calling thread does the first range itself. Fewer threads work if some would get less than
    `grain`. `work` must release the GIL and write only what belongs to its range.
    """
    threads = min(threads, size // grain)
    if threads < 2:
        work(0, size)
        return
    bounds = [size * i // threads for i in range(threads + 1)]
    others = [pool().submit(work, *bounds[i : i + 2]) for i in range(1, threads)]
    try:
        work(bounds[0], bounds[1])
    finally:
        # Nobody may still be writing when the caller has its array back, nor when it has an error.
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error
