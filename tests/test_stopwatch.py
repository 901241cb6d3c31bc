"""Stages add up, and those that ran earlier are in the total."""

from __future__ import annotations

import pytest

from transfercache import stopwatch
from transfercache.stopwatch import Stopwatch, busiest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the stopwatch reads; tests move it."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def fail_after(clock: list[float], seconds: float) -> None:
    clock[0] += seconds
    raise KeyError


def test_stages__add_up_also_when_they_raise(clock: list[float]) -> None:
    watch = Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.stage("fit"):
            clock[0] += seconds
    with pytest.raises(KeyError), watch.stage("load"):
        fail_after(clock, 4.0)
    assert watch.seconds() == {"fit": 3.0, "load": 4.0, "total": 7.0}


def test_earlier_stages__are_in_the_total(clock: list[float]) -> None:
    watch = Stopwatch({"hash": 5.0})
    clock[0] += 1.0
    assert watch.elapsed() == 6.0
    assert watch.seconds() == {"hash": 5.0, "total": 6.0}


@pytest.mark.parametrize(
    ("seconds", "stage"),
    [
        ({"decode": 10.0, "forward": 6.0, "write": 0.1, "total": 7.0}, "forward"),  # each of two threads: 5 s
        ({"decode": 13.0, "forward": 6.0, "write": 0.1, "total": 7.0}, "decode"),
        ({"decode": 2.0, "forward": 1.0, "write": 3.0, "hash": 99.0, "total": 99.0}, "write"),
        ({"decode": 0.5, "total": 1.0}, "decode"),
    ],
)
def test_busiest__is_the_stage_whose_threads_wait_least(seconds: dict[str, float], stage: str) -> None:
    assert busiest(seconds, threads={"decode": 2, "forward": 1, "write": 1}) == stage
