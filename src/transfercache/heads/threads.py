"""How many threads a solver's arithmetic gets: small steps are not shared between cores."""

from __future__ import annotations

from contextlib import AbstractContextManager

from threadpoolctl import threadpool_limits

#: Multiplications a step, about 1 ms on one core. Sharing less than that wins little on an idle machine, and on a busy
#: one the threads of numpy and torch spin while they wait for each other (ants and bees, 2 cores, load 5: linear took
#: 33 to 66 s with two threads and 1.4 s with one, logistic 1.1 and 0.15 s).
MIN_SHARED = 1 << 24


def threads_for(n_multiplications: int) -> AbstractContextManager[object]:
    """Keep BLAS and OpenMP, which torch runs on, to one thread for the block if its steps are smaller than that."""
    limit = 1 if n_multiplications < MIN_SHARED else None
    return threadpool_limits(limits=limit)  # type: ignore[no-any-return]  # it is untyped
