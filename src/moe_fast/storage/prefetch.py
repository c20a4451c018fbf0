"""Items made by another thread while the one that asked for them works on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """The same items, none of them `None`, up to `count` made before they are asked for.

    One thread makes them all, in order. An error in making an item is raised where the item would
    have been. When this generator is closed, `items` is, too, by the thread that it ran in.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="moe_fast_prefetch")
    coming = deque(pool.submit(next, items, None) for _ in range(count))
    try:
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item
    finally:
        for each in coming:
            each.cancel()
        pool.submit(items.close)
        pool.shutdown()
