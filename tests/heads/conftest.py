"""Tables of made embeddings whose right answer is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.table import FeatureTable
from transfercache.spec import ExtractSpec, Preprocessing

MakeTable = Callable[..., FeatureTable]


@pytest.fixture(scope="session")
def spec() -> ExtractSpec:
    preprocessing = Preprocessing(256, 224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return ExtractSpec("resnet18", "0" * 64, "pooled", preprocessing)


@pytest.fixture(scope="session")
def make_table(spec: ExtractSpec) -> MakeTable:
    """Rows that are each a component of their own, unless `group` says otherwise; `views` repeats them as views."""

    def make(
        features, labels, *, class_names: Sequence[str] = ("ant", "bee", "cat"), group=None, views: int = 1
    ) -> FeatureTable:
        n_rows = len(labels)
        return FeatureTable(
            blocks=ArrayBlocks(np.ascontiguousarray(features, dtype=np.float32)),
            labels=np.asarray(labels, dtype=np.int64),
            split=np.ones(n_rows, np.uint8),
            view=np.tile(np.arange(views, dtype=np.uint8), n_rows // views),
            group=np.arange(n_rows) // views if group is None else np.asarray(group, dtype=np.int64),
            row=np.arange(n_rows) // views,
            class_names=tuple(class_names),
            spec=spec,
            paths=tuple(f"{i:04}.jpg" for i in range(n_rows)),
        )

    return make


@pytest.fixture(scope="session")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """90 rows of three well separated classes in 6 dimensions, far from the origin and of very different scales.

    Class c is unit noise around 4 e_c; column j is then scaled by 10^(j-2) and moved by three times its scale, so a
    solver that does not standardise, or does not fold it back, fails. A classifier that is right on all rows exists.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    standard = 4 * np.eye(6)[labels] + rng.standard_normal((90, 6)).clip(-1.8, 1.8)
    scale = 10.0 ** np.arange(-2, 4)
    return (scale * (standard + 3)).astype(np.float32), labels


@pytest.fixture(scope="session")
def overlapping() -> tuple[np.ndarray, np.ndarray]:
    """300 rows of three classes in 8 dimensions that no linear map separates, so that penalties matter."""
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=300)
    return (0.8 * np.eye(8)[labels] + rng.standard_normal((300, 8))).astype(np.float32), labels
