from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from transfercache.errors import DataError
from transfercache.heads.fit import fit_head
from transfercache.heads.select import out_of_fold
from transfercache.splits import assign_folds

FIT = partial(fit_head, C=1.0)


def test_out_of_fold__logits_are_of_a_head_that_has_not_seen_the_row(make_table, overlapping):
    table = make_table(*overlapping)
    held = out_of_fold(table, FIT, seed=3)
    np.testing.assert_array_equal(held.rows, np.arange(300))
    fold_of, n_folds = assign_folds(table.labels, table.group, n_folds=5, seed=3)
    for fold in range(n_folds):
        head = FIT(table.subset(fold_of != fold))
        np.testing.assert_array_equal(held.logits[fold_of == fold], head.logits(table.features[fold_of == fold]))


def test_out_of_fold__memorised_rows_are_not_seen(make_table):
    # Random labels in more dimensions than rows: a head is right on all rows it has seen, and on half of the others.
    rng = np.random.default_rng(0)
    table = make_table(rng.standard_normal((80, 200)), np.arange(80) % 2, class_names=("a", "b"))
    assert np.mean(FIT(table).predict(table.features) == table.labels) == 1
    held = out_of_fold(table, FIT, seed=0)
    assert np.mean(held.logits.argmax(axis=1) == table.labels) < 0.7


def test_out_of_fold__copies_in_one_component_do_not_help(make_table):
    # The same, each row there four times: held out together, the copies give nothing away.
    rng = np.random.default_rng(0)
    features = np.repeat(rng.standard_normal((40, 200)), 4, axis=0)
    labels, group = np.repeat(np.arange(40) % 2, 4), np.repeat(np.arange(40), 4)
    shares = [
        np.mean(out_of_fold(table, FIT, seed=0).logits.argmax(axis=1) == labels)
        for table in (make_table(features, labels, class_names=("a", "b"), group=g) for g in (group, None))
    ]
    assert shares[0] < 0.7
    assert shares[1] > 0.95


def test_out_of_fold__views_train_and_the_first_is_scored(make_table, overlapping):
    features, labels = (np.repeat(array, 2, axis=0) for array in overlapping)
    features[1::2] += 0.1
    table = make_table(features, labels, views=2)
    held = out_of_fold(table, FIT, seed=0)
    np.testing.assert_array_equal(held.rows, np.arange(0, 600, 2))
    fold_of, _ = assign_folds(table.labels, table.group, n_folds=5, seed=0)
    first = held.rows[fold_of[held.rows] == 0]
    expected = FIT(table.subset(fold_of != 0)).logits(table.features[first])
    np.testing.assert_array_equal(held.logits[np.isin(held.rows, first)], expected)


def test_out_of_fold__what_cannot_be_held_out_is_left_out(make_table, overlapping):
    features, labels = overlapping
    labels = np.where(labels == 2, 1, labels)
    labels[7] = 2
    held = out_of_fold(make_table(features, labels), FIT, seed=0)
    np.testing.assert_array_equal(held.rows, np.delete(np.arange(300), 7))
    with pytest.raises(DataError, match="no class has two images"):
        out_of_fold(make_table(features[:3], [0, 1, 2]), FIT, seed=0)
