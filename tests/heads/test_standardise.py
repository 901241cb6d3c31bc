from __future__ import annotations

import numpy as np
import pytest

from transfercache.cache.blocks import BLOCK_ROWS, ArrayBlocks
from transfercache.heads import standardise
from transfercache.heads.problem import Affine
from transfercache.heads.standardise import Scale, Standardised


def test_scale__equals_standard_scaler():
    from sklearn.preprocessing import StandardScaler

    features = np.random.default_rng(0).normal(5, [1e-3, 1, 1e4], (50, 3)).astype(np.float32)
    features = np.hstack([features, np.full((50, 1), 0.1, np.float32)])
    scale = Scale.of(ArrayBlocks(features))
    reference = StandardScaler().fit(features.astype(np.float64))
    np.testing.assert_allclose(scale.apply(features), reference.transform(features.astype(np.float64)), atol=1e-9)
    assert scale.deviation[3] == 1


def test_scale__folds_back_into_raw_features():
    rng = np.random.default_rng(1)
    features = rng.normal(3, 2, (20, 4)).astype(np.float32)
    weight, bias = rng.standard_normal((3, 4)), rng.standard_normal(3)
    scale = Scale.of(ArrayBlocks(features))
    raw = scale.fold(weight, bias).logits(features.astype(np.float64))
    np.testing.assert_allclose(raw, scale.apply(features) @ weight.T + bias, rtol=1e-10)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_scale__survives_features_of_any_size(size):
    features = (np.random.default_rng(2).standard_normal((30, 2)) * size).astype(np.float32)
    np.testing.assert_allclose(Scale.of(ArrayBlocks(features)).apply(features).std(axis=0), 1)


def test_scale__merges_blocks_of_different_means():
    rng = np.random.default_rng(3)
    features = rng.normal(0, 1, (2 * BLOCK_ROWS + 7, 3)) + np.sort(rng.normal(100, 20, (2 * BLOCK_ROWS + 7, 1)), axis=0)
    features = features.astype(np.float32)
    scale = Scale.of(ArrayBlocks(features))
    np.testing.assert_allclose(scale.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(scale.deviation, features.std(axis=0, dtype=np.float64), rtol=1e-12)


def test_scale__unfold_is_the_inverse_of_fold():
    rng = np.random.default_rng(4)
    scale = Scale.of(ArrayBlocks(rng.normal(3, 2, (20, 4)).astype(np.float32)))
    affine = Affine(rng.standard_normal((3, 4)), rng.standard_normal(3))
    again = scale.fold(*scale.unfold(affine))
    np.testing.assert_allclose(again.weight, affine.weight, rtol=1e-12)
    np.testing.assert_allclose(again.bias, affine.bias, rtol=1e-10)


def test_standardised__rows_read_anew_equal_those_in_memory(monkeypatch):
    features = np.random.default_rng(5).normal(3, 2, (BLOCK_ROWS + 9, 4)).astype(np.float32)
    kept = Standardised(ArrayBlocks(features), np.float32)
    monkeypatch.setattr(standardise, "MAX_BYTES_IN_MEMORY", features.nbytes - 1)
    streamed = Standardised(ArrayBlocks(features), np.float32)
    assert (kept.is_in_memory, streamed.is_in_memory) == (True, False)
    np.testing.assert_array_equal(streamed.read(3, 4100), kept.read(3, 4100))
    np.testing.assert_array_equal(kept.take(np.array([7, 2])), kept.read(0, 8)[[7, 2]])
    with pytest.raises(ValueError, match="scattered rows"):
        streamed.take(np.array([7, 2]))
