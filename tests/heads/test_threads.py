from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from transfercache.heads import threads
from transfercache.heads.threads import MIN_SHARED, share_rows, threads_for


def n_threads() -> list[int]:
    np.ones((2, 2)) @ np.ones((2, 2))  # numpy's BLAS is loaded
    return [pool["num_threads"] for pool in threadpool_info()]


def test_threads_for__small_steps_get_one_thread_and_large_ones_all():
    before = n_threads()
    with threads_for(MIN_SHARED - 1):
        assert set(n_threads()) == {1}
    assert n_threads() == before
    with threads_for(MIN_SHARED):
        assert n_threads() == before


def test_share_rows__on_many_cores__all_shares_run_at_once(monkeypatch: pytest.MonkeyPatch):
    n_cores = 40
    monkeypatch.setattr(threads, "n_cores", lambda: n_cores)
    met = Barrier(n_cores)

    def meet(share: list[slice]) -> list[slice]:
        met.wait(timeout=20)  # raises where one of them has not begun
        return share

    assert share_rows(n_cores, MIN_SHARED, meet) == [[slice(row, row + 1)] for row in range(n_cores)]
