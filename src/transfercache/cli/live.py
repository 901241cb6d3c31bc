"""A comparison while it runs: finished strategies and estimates on stderr, and the table of them if it is cut short."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from transfercache.commands.compare import Comparison


class LiveComparison:
    """Give its methods to `compare` inside a `with`; whatever ends that early, the finished rows are printed."""

    def __init__(self) -> None:
        self._latest: Comparison | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._latest is not None:
            from rich.console import Console

            Console(stderr=True, soft_wrap=True).print(self._latest.render())

    def on_result(self, comparison: Comparison) -> None:
        """Print the strategy that has just been finished."""
        self._latest = comparison
        _say(comparison.latest_line)

    def on_estimate(self, label: str, seconds: float) -> None:
        """Print how long a strategy will still take."""
        _say(f"{label}: about {timedelta(seconds=round(seconds))} to go (h:mm:ss, at the measured pace)")


def _say(line: str) -> None:
    from tqdm import tqdm

    # Above a progress bar that may be standing there.
    tqdm.write(line, file=sys.stderr)
