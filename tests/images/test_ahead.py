from __future__ import annotations

import threading
import time

import pytest

from transfercache.images.ahead import run_ahead


def test_run_ahead__in_order_whatever_ends_first() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (5 - item % 5))
        return item * item

    done = [(item, future.result()) for item, future in run_ahead(range(20), work, workers=4, window=8)]
    assert done == [(item, item * item) for item in range(20)]


def test_run_ahead__futures_may_be_asked_later() -> None:
    kept = list(run_ahead(range(6), lambda item: item + 1, workers=2, window=3))
    assert [future.result() for _, future in kept] == [1, 2, 3, 4, 5, 6]


def test_run_ahead__is_no_further_ahead_than_the_window() -> None:
    started: list[int] = []
    with_window = run_ahead(range(100), started.append, workers=2, window=5)
    next(with_window)
    time.sleep(0.05)
    assert len(started) <= 5
    with_window.close()


def test_run_ahead__closed_early__ends_its_threads_and_leaves_the_rest_undone() -> None:
    before = threading.active_count()
    started: list[int] = []

    def work(item: int) -> None:
        started.append(item)
        time.sleep(0.01)

    images = run_ahead(range(1000), work, workers=1, window=500)
    next(images)
    images.close()
    assert threading.active_count() == before
    assert len(started) < 100


def test_run_ahead__an_error_is_the_futures() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ValueError("one")
        return item

    outcomes = []
    for _, future in run_ahead(range(3), work, workers=1, window=2):
        outcomes.append(future.exception())
    assert [type(error) for error in outcomes] == [type(None), ValueError, type(None)]
    with pytest.raises(ValueError, match="one"):
        raise outcomes[1]
