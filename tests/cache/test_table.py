from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.table import FeatureTable


def _table(extraction: Any, **changes: Any) -> FeatureTable:
    n = extraction.n_images
    values: dict[str, Any] = {
        "blocks": ArrayBlocks(extraction.features),
        "labels": extraction.label,
        "split": extraction.split,
        "view": np.zeros(n, np.uint8),
        "group": np.arange(n) * 10,
        "row": np.arange(n),
        "class_names": ("ant", "bee"),
        "spec": extraction.spec,
        "paths": tuple(f"{i}.jpg" for i in range(n)),
    }
    return FeatureTable(**{**values, **changes})


def test_subset__mask_and_index(extraction: Any) -> None:
    table = _table(extraction)
    chosen = table.subset(np.array([7, 2, 2]))
    np.testing.assert_array_equal(chosen.features, extraction.features[[7, 2, 2]])
    assert chosen.paths == ("7.jpg", "2.jpg", "2.jpg")
    assert chosen.group.tolist() == [70, 20, 20]
    assert chosen.row.tolist() == [7, 2, 2]
    masked = table.subset(np.arange(10) > 7)
    assert masked.labels.tolist() == [0, 1]
    assert masked.paths == ("8.jpg", "9.jpg")
    assert len(table.subset(np.zeros(10, bool))) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(9, np.int64)}, r"labels must be int64 \[10\], got int64 \(9,\)"),
        ({"split": np.zeros(10, np.int64)}, "split must be uint8"),
        ({"labels": np.full(10, 2)}, "labels must lie between -1 and 1"),
        ({"paths": ("a",)}, "1 paths for 10 rows"),
    ],
)
def test_table__invariants(extraction: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _table(extraction, **changes)
