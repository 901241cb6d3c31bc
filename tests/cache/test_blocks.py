from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transfercache.cache.blocks import BLOCK_ROWS, ArrayBlocks, in_order


def test_array_blocks__take_composes_without_a_copy() -> None:
    array = np.arange(20, dtype=np.float32).reshape(10, 2)
    blocks = ArrayBlocks(array).take(np.array([9, 1, 4, 4])).take(np.array([3, 0]))
    assert blocks.shape == (2, 2)
    assert blocks.array is array
    np.testing.assert_array_equal(blocks.read(0, 2), array[[4, 9]])
    assert np.shares_memory(ArrayBlocks(array).read(2, 5), array)


@pytest.mark.parametrize("array", [np.zeros((10, 6)), np.zeros((6, 10), np.float32).T, np.zeros(6, np.float32)])
def test_array_blocks__refuse_other_arrays(array: Any) -> None:
    with pytest.raises(ValueError, match="features must be C-contiguous float32"):
        ArrayBlocks(array)


def test_in_order__gives_every_row_once_at_its_place() -> None:
    array = np.arange(BLOCK_ROWS + 3, dtype=np.float32)[:, None]
    places, rows = zip(*in_order(ArrayBlocks(array)), strict=True)
    assert places == (slice(0, BLOCK_ROWS), slice(BLOCK_ROWS, BLOCK_ROWS + 3))
    np.testing.assert_array_equal(np.concatenate(rows), array)
