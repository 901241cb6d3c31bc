from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_info

from transfercache.heads.threads import MIN_SHARED, threads_for


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
