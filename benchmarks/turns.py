"""What the benchmarks share: sides that take turns, processes with their peak memory, and how figures are summed up."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Figure = TypeVar("Figure")

#: The words of the program as its start script runs it, which a checkout that is on PYTHONPATH alone does not have.
TLC = (sys.executable, "-c", "from transfercache.cli.main import run; run()")
#: Rows and columns of the square product that the machine's rate is taken from: large enough for its full speed.
_SGEMM = 2048
_SGEMM_REPEATS = 5


@dataclass(frozen=True)
class Finished:
    """One process that ended well."""

    seconds: float  # wall, from its start to its end
    peak_bytes: int  # of its memory
    stdout: str


def run_process(
    words: Sequence[str], *, env: Mapping[str, str] | None = None, folder: Path | str | None = None
) -> Finished:
    """Run a process to its end, in `folder`; `env` is added to this one's. Ends the benchmark where it fails.

    Until it loads a program of its own a child counts as large as its parent, so measure peaks from a small one.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=errors, env={**os.environ, **(env or {})}, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # else it would wait for it again
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{errors.read().decode()[-2000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return Finished(seconds, usage.ru_maxrss * unit, out.read().decode())


def in_turns(sides: Mapping[str, Callable[[], Figure]], *, repeats: int) -> dict[str, list[Figure]]:
    """Return what each side gives, run in turns after one round that is not counted, or with no repeats in that one.

    In turns, so that a drift of the machine's speed falls on all alike.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            figure = side()
            if repeat or not repeats:
                figures[name].append(figure)
    return figures


def timed(work: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, rounded for reading."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the spread of one side over another, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def sgemm_gflops(multiply: Callable[[Any, Any], Any] = np.matmul, convert: Callable[[Any], Any] = np.asarray) -> float:
    """Return the best rate in GFLOP/s of a large float32 product on all cores, by numpy or by what is given."""
    a = convert(np.random.default_rng(0).standard_normal((_SGEMM, _SGEMM), dtype=np.float32))
    # The first starts the threads, and is never the best.
    return 2 * _SGEMM**3 / min(timed(lambda: multiply(a, a)) for _ in range(_SGEMM_REPEATS + 1)) / 1e9
