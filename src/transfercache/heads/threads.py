"""How a solver's arithmetic is shared between cores: small steps are not, rows are shared block by block."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import TypeVar

from threadpoolctl import threadpool_limits

from transfercache.cache.blocks import BLOCK_ROWS
from transfercache.environment import n_cores

Sums = TypeVar("Sums")

#: Multiplications a step, about 1 ms on one core. Sharing less than that wins little on an idle machine, and on a busy
#: one the threads of numpy and torch spin while they wait for each other (ants and bees, 2 cores, load 5: linear took
#: 33 to 66 s with two threads and 1.4 s with one, logistic 1.1 and 0.15 s).
MIN_SHARED = 1 << 24


def threads_for(n_multiplications: int) -> AbstractContextManager[object]:
    """Keep BLAS and OpenMP, which torch runs on, to one thread for the block if its steps are smaller than that."""
    limit = 1 if n_multiplications < MIN_SHARED else None
    return threadpool_limits(limits=limit)  # type: ignore[no-any-return]  # it is untyped


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep BLAS to one thread for the block, inside which `share_rows` has threads of its own.

    Those meet no barrier in the middle of a block of rows: on a busy machine (2 cores, load 4) a pass over 50,000 x 512
    rows of 100 classes took 0.17 s in two such threads and 1.0 s in two of OpenBLAS's.
    """
    return threadpool_limits(limits=1, user_api="blas")  # type: ignore[no-any-return]  # it is untyped


def share_rows(n_rows: int, n_multiplications: int, work: Callable[[list[slice]], Sums]) -> list[Sums]:
    """Return what `work` makes of each thread's blocks of rows; one thread where the arithmetic is small.

    Thread i of T takes every T-th block, so that on one machine sums are always formed in the same order.
    """
    n_threads = n_cores() if n_multiplications >= MIN_SHARED else 1
    # As many for each thread, and all of one size to within the last.
    n_blocks = n_threads * -(-n_rows // (n_threads * BLOCK_ROWS))
    block_rows = max(1, -(-n_rows // n_blocks))
    blocks = [slice(start, min(start + block_rows, n_rows)) for start in range(0, n_rows, block_rows)]
    shares = [blocks[i::n_threads] for i in range(n_threads)]
    others = [_pool(os.getpid(), n_threads).submit(work, share) for share in shares[1:]]
    return [work(shares[0]), *(other.result() for other in others)]


@cache
def _pool(process: int, n_threads: int) -> ThreadPoolExecutor:
    """Return threads that live as long as the process: those of each pass took twice as long, their memory being new.

    A fork has the number of another process, and threads of its own.
    """
    return ThreadPoolExecutor(n_threads, thread_name_prefix="rows")  # which else has 32 at most
