from __future__ import annotations

import numpy as np
import pytest

from transfercache.cache import blocks
from transfercache.errors import DataError
from transfercache.heads import knn


def knn_probabilities(table, queries, *, k, n_classes):
    return knn.knn_probabilities(table.blocks, table.labels, queries, k=k, n_classes=n_classes)


def unit(degrees) -> np.ndarray:
    """Unit vectors in the plane."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_knn__equals_scikit_learn_where_votes_do_not_tie(make_table, overlapping):
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = overlapping
    table = make_table(features[:200], labels[:200])
    ours = knn_probabilities(table, features[200:], k=5, n_classes=3)
    reference = KNeighborsClassifier(5, metric="cosine").fit(features[:200], labels[:200])
    np.testing.assert_allclose(ours, reference.predict_proba(features[200:]), atol=2e-6)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-12)


def test_knn__length_of_an_embedding_does_not_matter(make_table, overlapping):
    features, labels = overlapping
    lengths = np.random.default_rng(0).uniform(0.1, 10, (300, 1)).astype(np.float32)
    plain = knn_probabilities(make_table(features[:200], labels[:200]), features[200:], k=5, n_classes=3)
    scaled = knn_probabilities(
        make_table(features[:200] * lengths[:200], labels[:200]), features[200:] * lengths[200:], k=5, n_classes=3
    )
    np.testing.assert_allclose(scaled, plain, atol=1e-9)


def test_knn__tied_votes_go_to_the_nearer_class_and_then_to_the_first(make_table):
    # Two votes each: bees are nearer by a degree. In the second table both classes are equally near.
    nearer = make_table(unit([10, -20, 9, -20]), [0, 0, 1, 1])
    assert knn_probabilities(nearer, unit([0]), k=4, n_classes=3).argmax(axis=1) == [1]
    equal = make_table(unit([10, -20, 10, -20]), [1, 1, 0, 0])
    assert knn_probabilities(equal, unit([0]), k=4, n_classes=3).argmax(axis=1) == [0]


def test_knn__nearness_outweighs_no_vote(make_table):
    table = make_table(unit([0, 0, 170, 175, 178]), [1, 1, 0, 0, 0])
    probabilities = knn_probabilities(table, unit([0]), k=5, n_classes=3)
    np.testing.assert_allclose(probabilities, [[0.6, 0.4, 0]], atol=1e-6)
    assert probabilities[0, 2] == 0


def test_knn__of_equally_near_rows_the_first_vote(make_table):
    table = make_table(unit([0, 0, 0, 90]), [2, 1, 0, 0])
    probabilities = knn_probabilities(table, unit([0]), k=2, n_classes=3)
    np.testing.assert_allclose(probabilities, [[0, 0.5, 0.5]], atol=1e-6)


def test_knn__fewer_rows_than_neighbours_all_vote(make_table):
    table = make_table(unit([0, 10, 90]), [0, 1, 1])
    np.testing.assert_allclose(knn_probabilities(table, unit([0]), k=5, n_classes=3), [[1 / 3, 2 / 3, 0]], atol=1e-6)


def test_knn__zero_embedding_is_equally_near_to_all(make_table):
    table = make_table(unit([0, 10, 90]), [0, 1, 1])
    probabilities = knn_probabilities(table, np.zeros((1, 2), np.float32), k=1, n_classes=3)
    np.testing.assert_array_equal(probabilities, [[1, 0, 0]])


def test_knn__blocks_do_not_change_the_result(make_table, overlapping, monkeypatch):
    features, labels = overlapping
    table = make_table(features[:200], labels[:200])
    whole = knn_probabilities(table, features[200:], k=5, n_classes=3)
    monkeypatch.setattr(knn, "BLOCK_ELEMENTS", 21 * 7)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 21)
    np.testing.assert_allclose(knn_probabilities(table, features[200:], k=5, n_classes=3), whole, atol=1e-9)


def test_knn__unlabelled_rows_do_not_vote(make_table):
    table = make_table(unit([0, 5, 90]), [-1, -1, 1])
    np.testing.assert_array_equal(knn_probabilities(table, unit([0]), k=1, n_classes=3), [[0, 1, 0]])
    with pytest.raises(DataError, match="kNN needs labelled training rows"):
        knn_probabilities(make_table(unit([0]), [-1]), unit([0]), k=1, n_classes=3)
