"""Wall seconds by stage, from a monotonic clock, with the device synchronised by the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Accumulates seconds per named stage; stages may run in several threads at once.

    A stage that runs in n threads sums their time, so it can exceed the total. Work on an accelerator is
    asynchronous: synchronise the device inside the stage that should be charged for it.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        """Start with the seconds of stages that ran `earlier`; they are part of the total."""
        self._lock = threading.Lock()
        self._stages = dict(earlier or {})
        self._start = time.perf_counter() - sum(self._stages.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of the block to `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Charge `seconds` to `name`."""
        with self._lock:
            self._stages[name] = self._stages.get(name, 0.0) + seconds

    def elapsed(self) -> float:
        """Seconds since this stopwatch was made, and those of earlier stages."""
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Return the stages so far and `total`, all in seconds."""
        with self._lock:
            return {**self._stages, "total": self.elapsed()}


def busiest(seconds: Mapping[str, float], *, threads: Mapping[str, int]) -> str:
    """Return the stage that the others wait for; `threads` is how many run each.

    That is the one whose threads were at work for most of the time. Stages that share their cores hold each other up,
    which does not change who waits.
    """
    return max(threads, key=lambda stage: seconds.get(stage, 0.0) / threads[stage])
