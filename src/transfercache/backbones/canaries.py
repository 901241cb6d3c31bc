"""Four images that tell whether a network is the one it was. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transfercache.randomness import derive_rng

_N_CANARIES = 4
_CANARY_GRID = 7  # a few blobs across the image: smooth, as photographs are


def canary_pixels(crop: int) -> NDArray[np.uint8]:
    """Return the uint8 [4, crop, crop, 3] images that tell whether a network is the one it was: fixed for ever.

    Random grids, interpolated between their points in whole numbers, so that every machine makes the same bytes.
    """
    points = _CANARY_GRID - 1
    grid = derive_rng(0, "canary").integers(0, 256, (_N_CANARIES, _CANARY_GRID, _CANARY_GRID, 3))  # int64
    position = np.arange(crop, dtype=np.int64) * points  # in units of 1 / crop of a grid cell
    cell, weight = position // crop, position % crop
    rows = grid[:, cell] * (crop - weight)[:, None, None] + grid[:, cell + 1] * weight[:, None, None]
    left, right = rows[:, :, cell], rows[:, :, cell + 1]
    images = left * (crop - weight)[:, None] + right * weight[:, None]  # int64 [4, crop, crop, 3], times crop squared
    return (images // (crop * crop)).astype(np.uint8)
