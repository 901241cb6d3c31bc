"""An epoch in shuffled minibatches, also of rows that do not fit into memory and lie sorted by class."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from transfercache.arrays import Float32Array, Int64Array
from transfercache.heads.standardise import Standardised

#: Rows that are read from a file at once, and how many such chunks, drawn over the whole file, are mixed.
CHUNK_ROWS = 256
MIN_CHUNKS = 64


def minibatches(
    rows: Standardised, n_batches: int, rng: np.random.Generator
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield every row once, in `n_batches` of equal size to within a few rows: indices [B] and rows float32 [B, D].

    In memory all rows are shuffled. Else MIN_CHUNKS or more chunks of CHUNK_ROWS from all over the file are shuffled
    with each other: folders arrive sorted by class, and shuffling inside one block of such a file trains on one class
    after another.
    """
    n_rows = rows.shape[0]
    if rows.is_in_memory:
        # Equal sizes: a last batch of a few rows would be a noisy step.
        for index in np.array_split(rng.permutation(n_rows), n_batches):
            yield index, rows.take(index)
        return
    starts = rng.permutation(np.arange(0, n_rows, CHUNK_ROWS))
    mixtures = np.array_split(starts, max(1, len(starts) // MIN_CHUNKS))
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        # The next mixture is read while this one is trained on.
        ahead = reader.submit(_read, rows, mixtures[0])
        for following in [*mixtures[1:], None]:
            index, x = ahead.result()
            if following is not None:
                ahead = reader.submit(_read, rows, following)
            n_here = max(1, round(n_batches * len(index) / n_rows))
            for order in np.array_split(rng.permutation(len(index)), n_here):
                yield index[order], x[order]


def _read(rows: Standardised, starts: Int64Array) -> tuple[Int64Array, Float32Array]:
    """Return the row numbers [M] and the rows float32 [M, D] of the chunks that begin at `starts`."""
    chunks = [(int(start), min(int(start) + CHUNK_ROWS, rows.shape[0])) for start in starts]
    index = np.concatenate([np.arange(start, stop) for start, stop in chunks])
    return index, np.concatenate([rows.read(start, stop) for start, stop in chunks])
