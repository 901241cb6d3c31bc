"""Standardised rows, each column with mean 0 and variance 1, and the way back to raw embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Float64Array, Int64Array
from transfercache.cache.blocks import FeatureBlocks
from transfercache.heads.problem import Affine
from transfercache.heads.threads import share_rows

#: Standardised rows are kept in memory up to this; more are read and standardised again in every pass.
MAX_BYTES_IN_MEMORY = 512 << 20


def least_deviation(mean: Float64Array) -> Float64Array:
    """Return [D], what float32 cannot tell from the mean: blowing it up to unit variance would fit rounding."""
    return np.asarray(np.finfo(np.float32).eps * np.abs(mean) + np.finfo(np.float32).tiny / np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of n rows the mean [D] and the sum of squares about it [D]."""

    n_rows: int
    mean: Float64Array
    squares: Float64Array

    def merge(self, other: _Moments) -> _Moments:
        """Return those of both together."""
        n_rows = self.n_rows + other.n_rows
        if n_rows == 0:
            return self
        shift, share = other.mean - self.mean, other.n_rows / n_rows
        squares = self.squares + other.squares + shift**2 * (self.n_rows * share)
        return _Moments(n_rows, self.mean + shift * share, squares)


@dataclass(frozen=True, eq=False)
class Scale:
    """Standardisation by column, as scikit-learn's StandardScaler has it (population standard deviation)."""

    mean: Float64Array  # [D]
    deviation: Float64Array  # [D], 1 where the column is constant

    @classmethod
    def of(cls, blocks: FeatureBlocks) -> Scale:
        """Measure the columns in float64, merging blocks (Chan, Golub and LeVeque, 1983, equation 2.1)."""
        n_rows, dim = blocks.shape

        def measure(places: list[slice]) -> _Moments:
            moments = _Moments(0, np.zeros(dim), np.zeros(dim))
            for place in places:
                features = blocks.read(place.start, place.stop)
                mean = features.mean(axis=0, dtype=np.float64)
                centred = features - mean  # float64 [B, D]
                moments = moments.merge(_Moments(len(features), mean, np.einsum("ij,ij->j", centred, centred)))
            return moments

        moments = reduce(_Moments.merge, share_rows(n_rows, n_rows * dim, measure))
        mean = moments.mean
        deviation = np.sqrt(moments.squares / n_rows)
        return cls(mean, np.where(deviation > least_deviation(mean), deviation, 1.0))

    def apply(self, features: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """Return the standardised features [N, D], calculated in `dtype`."""
        x: npt.NDArray[Any] = features - self.mean.astype(dtype)
        x *= (1 / self.deviation).astype(dtype)
        return x

    def fold(self, weight: Float64Array, bias: Float64Array) -> Affine:
        """Turn a map on standardised features into the same map on raw ones."""
        raw = weight / self.deviation
        return Affine(raw, bias - raw @ self.mean)

    def unfold(self, affine: Affine) -> tuple[Float64Array, Float64Array]:
        """Return weight [K, D] and bias [K] on standardised features of a map on raw ones."""
        return affine.weight * self.deviation, affine.bias + affine.weight @ self.mean


class Standardised:
    """The rows of `blocks`, standardised by `scale`, by default their own, in `dtype`; in memory where they fit."""

    def __init__(self, blocks: FeatureBlocks, dtype: npt.DTypeLike, scale: Scale | None = None) -> None:
        self.shape, self.dtype = blocks.shape, np.dtype(dtype)
        self.scale = Scale.of(blocks) if scale is None else scale
        self._blocks = blocks
        self._rows: npt.NDArray[Any] | None = None  # [N, D]
        n_rows, dim = self.shape
        if n_rows * dim * self.dtype.itemsize <= MAX_BYTES_IN_MEMORY:
            rows = self._rows = np.empty(self.shape, self.dtype)

            def fill(places: list[slice]) -> None:
                for place in places:
                    rows[place] = self.scale.apply(blocks.read(place.start, place.stop), self.dtype)

            share_rows(n_rows, n_rows * dim, fill)

    @property
    def is_in_memory(self) -> bool:
        """Whether a pass reads no file."""
        return self._rows is not None

    def take(self, index: Int64Array) -> npt.NDArray[Any]:
        """Return the rows at `index` [B] as [B, D]; only where they are in memory."""
        if self._rows is None:
            raise ValueError("scattered rows are not read from a file")
        return self._rows[index]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [start, stop) as [B, D]; threads may read at the same time."""
        if self._rows is not None:
            return self._rows[start:stop]
        return self.scale.apply(self._blocks.read(start, stop), self.dtype)
