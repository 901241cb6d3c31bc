"""Work done ahead of its reader, in threads, in order and within a bound; the one pool for everything that decodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from transfercache.environment import n_cores

Item = TypeVar("Item")
Done = TypeVar("Done")

# More threads than these decode less: on 16 cores 8 made 1,650 images a second, 16 made 1,180 (docs/experiments.md).
_MAX_THREADS = 8


def decoding_threads(workers: int | None) -> int:
    """Return how many threads decode: as many as are asked for, else one a core up to eight."""
    return workers or min(n_cores(), _MAX_THREADS)


def run_ahead(
    items: Iterable[Item], work: Callable[[Item], Done], *, workers: int | None, window: int
) -> Generator[tuple[Item, Future[Done]], None, None]:
    """Yield each item with the future of `work` on it, in the order of `items`; at most `window` are under way.

    Threads, because Pillow releases the interpreter lock; how many, `decoding_threads` says. Close the generator to end
    them early.
    """
    pool = ThreadPoolExecutor(decoding_threads(workers), thread_name_prefix="decode")
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
