"""`FeatureBlocks`: feature rows as a solver reads them, block by block, whether they are in memory or in files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Float32Array, Int64Array

#: Rows a block: enough for a matrix product to run at full speed, 8 MiB of 512 features.
BLOCK_ROWS = 4096


def rows_within(n_bytes: int, dim: int) -> int:
    """Return how many float32 rows of width `dim` take `n_bytes`, at least one: rows are of 2 KB, or of hundreds."""
    return max(n_bytes // (4 * dim), 1)


class Readable(Protocol):
    """What `in_order` needs of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [start, stop) as [B, D]."""


class FeatureBlocks(Readable, Protocol):
    """N feature rows; `take` selects without reading, and threads may `read` at the same time."""

    def read(self, start: int, stop: int) -> Float32Array:
        """Return float32 [stop - start, D], which may be a view and is not to be written to."""

    def take(self, index: Int64Array) -> FeatureBlocks:
        """Return the rows at `index`, int64 [M], in that order."""


@dataclass(frozen=True, eq=False)
class ArrayBlocks:
    """Rows of an array in memory: all of them, or those at `index`."""

    array: Float32Array  # [rows, D]
    index: Int64Array | None = None  # int64 [N]

    def __post_init__(self) -> None:
        if self.array.ndim != 2 or self.array.dtype != np.float32 or not self.array.flags.c_contiguous:
            raise ValueError(f"features must be C-contiguous float32 [N, D], got {self.array.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        return len(self.array if self.index is None else self.index), self.array.shape[1]

    def read(self, start: int, stop: int) -> Float32Array:
        """Return float32 [stop - start, D]."""
        return self.array[start:stop] if self.index is None else self.array[self.index[start:stop]]

    def take(self, index: Int64Array) -> ArrayBlocks:
        """Return the rows at `index`, int64 [M], in that order; nothing is copied."""
        return ArrayBlocks(self.array, index if self.index is None else self.index[index])


def in_order(blocks: Readable) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    """Yield all rows as (place, [B, D])."""
    n_rows = blocks.shape[0]
    for start in range(0, n_rows, BLOCK_ROWS):
        place = slice(start, min(start + BLOCK_ROWS, n_rows))
        yield place, blocks.read(place.start, place.stop)
