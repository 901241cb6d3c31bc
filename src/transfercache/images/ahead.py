"""Work done ahead of its reader, in threads, in order and within a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")


def run_ahead(
    items: Iterable[Item], work: Callable[[Item], Done], *, workers: int, window: int
) -> Generator[tuple[Item, Future[Done]], None, None]:
    """Yield each item with the future of `work` on it, in the order of `items`; at most `window` are under way.

    Close the generator to end its threads early.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    waiting: deque[tuple[Item, Future[Done]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= window:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    except BaseException:  # closed early, or Ctrl-C: what nobody will read is not decoded
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
