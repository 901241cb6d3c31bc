"""A comparison while it runs: finished strategies and estimates on stderr, and the table of them if it is cut short."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfercache.commands.compare import Comparison


@contextmanager
def show_live() -> Iterator[dict[str, Callable[..., Any]]]:
    """Give the callbacks of `compare`; whatever ends the block early, the finished rows are printed."""
    latest: Comparison | None = None

    def on_result(comparison: Comparison) -> None:
        nonlocal latest
        latest = comparison
        _say(comparison.latest_line)

    def on_estimate(label: str, seconds: float) -> None:
        _say(f"{label}: about {timedelta(seconds=round(seconds))} to go (h:mm:ss, at the measured pace)")

    try:
        yield {"on_result": on_result, "on_estimate": on_estimate}
    except BaseException:
        if latest is not None:
            from rich.console import Console

            Console(stderr=True, soft_wrap=True).print(latest.render())
        raise


def _say(line: str) -> None:
    from tqdm import tqdm

    # Above a progress bar that may be standing there.
    tqdm.write(line, file=sys.stderr)
