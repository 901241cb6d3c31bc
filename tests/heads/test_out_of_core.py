"""Rows that do not fit into memory: the same heads, from a file that is sorted by class as folders are."""

from __future__ import annotations

import numpy as np
import pytest

from transfercache.heads import linear, logistic, standardise
from transfercache.heads.fit import fit_head
from transfercache.heads.linear import CHUNK_ROWS, MIN_CHUNKS, minibatches
from transfercache.heads.standardise import Standardised


@pytest.fixture
def sorted_classes(make_table):
    """100 classes of 200 training and 40 further rows, sorted by class, of which a good head gets most right."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.standard_normal((100, 32))
    names = [f"class {i}" for i in range(100)]

    def draw(n_of_each):
        labels = np.repeat(np.arange(100), n_of_each)
        features = means[labels] + rng.standard_normal((len(labels), 32))
        return make_table(features, labels, class_names=names, group=np.zeros(len(labels)))

    return draw(200), draw(40)


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(standardise, "MAX_BYTES_IN_MEMORY", 0)


def accuracy(head, table):
    return np.mean(head.predict(table.features) == table.labels)


def test_linear__class_sorted_rows_from_a_file_are_learnt_as_well_as_in_memory(sorted_classes, monkeypatch):
    train, held_out = sorted_classes
    # All in one component: no folds, and the default number of epochs.
    in_memory = accuracy(fit_head(train, solver="linear"), held_out)
    monkeypatch.setattr(standardise, "MAX_BYTES_IN_MEMORY", 0)
    # 20,000 rows are 79 chunks: one mixture of all. As in a larger file, let it be several of a part of the classes.
    monkeypatch.setattr(linear, "CHUNK_ROWS", 50)
    from_file = accuracy(fit_head(train, solver="linear"), held_out)
    assert from_file >= in_memory - 0.005
    assert in_memory > 0.5


def test_minibatches__from_a_file_give_each_row_once_from_chunks_all_over_it(sorted_classes, no_memory, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK_ROWS", 50)
    rows = Standardised(sorted_classes[0].blocks, np.float32)
    seen, spread = [], []
    for index, x in minibatches(rows, 40, np.random.default_rng(1)):
        seen.append(index)
        spread.append(len(np.unique(index // 50)))
        np.testing.assert_array_equal(x[0], rows.read(int(index[0]), int(index[0]) + 1)[0])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(20_000))
    assert len(seen) == pytest.approx(40, abs=3)
    # 500 rows from the 64 or more chunks that are mixed: nearly all of these are met in each batch.
    assert min(spread) >= 55
    assert (CHUNK_ROWS, MIN_CHUNKS) == (256, 64)


@pytest.mark.parametrize("solver", ["logistic", "ridge", "linear"])
def test_solvers__rows_read_in_every_pass_give_the_head_of_rows_in_memory(make_table, overlapping, solver, monkeypatch):
    settings = {"solver": solver, **({"optimizer": "lbfgs"} if solver == "linear" else {})}
    in_memory = fit_head(make_table(*overlapping), **settings)
    monkeypatch.setattr(standardise, "MAX_BYTES_IN_MEMORY", 0)
    rough = fit_head(make_table(*overlapping), **settings)
    monkeypatch.setattr(logistic, "CONVERGED_GAP", logistic.GAP[np.dtype(np.float64)])
    streamed = fit_head(make_table(*overlapping), **settings)
    if solver == "logistic":  # ends earlier where each pass reads a file
        assert in_memory.chosen["relative_gap"] < 1e-8 < rough.chosen["relative_gap"] < 1e-3
        assert rough.chosen["passes"] < in_memory.chosen["passes"]
    np.testing.assert_allclose(streamed.weight, in_memory.weight, rtol=1e-4, atol=1e-5)
    assert streamed.chosen == in_memory.chosen
