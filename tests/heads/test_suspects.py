"""Against cleanlab, the authors' own implementation, and against a table worked by hand."""

from __future__ import annotations

import csv
from functools import partial

import numpy as np
import pytest
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores

from transfercache.heads.fit import fit_head
from transfercache.heads.select import out_of_fold
from transfercache.heads.suspects import find_suspects, write_suspects
from transfercache.metrics import softmax

# The classes' thresholds are the means of their own column: a (0.9 + 0.8 + 0.1) / 3 = 0.6, b (0.7 + 0.5) / 2 = 0.6,
# c (0.4) = 0.4.
GIVEN = np.array([0, 0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [
        [0.90, 0.05, 0.05],
        [0.80, 0.10, 0.10],
        [0.10, 0.70, 0.20],  # labelled a, confidently b
        [0.10, 0.70, 0.20],
        [0.05, 0.50, 0.45],  # labelled b; c alone is confident, but b is the most probable
        [0.61, 0.00, 0.39],  # labelled c, confidently a
    ]
)


def test_suspects__worked_by_hand():
    suspects = find_suspects(GIVEN, PROBABILITIES)
    assert suspects.order.tolist() == [2, 5, 4, 3, 1, 0]
    assert suspects.suggested.tolist() == [0, 0, 1, 1, 1, 0]
    assert suspects.is_issue.tolist() == [False, False, True, False, False, True]
    np.testing.assert_allclose(suspects.self_confidence, [0.9, 0.8, 0.1, 0.7, 0.5, 0.39])
    np.testing.assert_allclose(suspects.margin, [0.85, 0.7, -0.6, 0.5, 0.05, -0.22])


@pytest.fixture(scope="module")
def noisy() -> tuple[np.ndarray, np.ndarray]:
    """600 rows of four classes, of unequal sizes and confidence, a tenth of whose labels are wrong."""
    rng = np.random.default_rng(0)
    truth = rng.choice(4, size=600, p=[0.5, 0.3, 0.15, 0.05])
    probabilities = softmax(rng.standard_normal((600, 4)) + np.array([2.0, 3, 2, 4])[truth, None] * np.eye(4)[truth])
    given = np.where(rng.random(600) < 0.1, rng.integers(4, size=600), truth)
    return given, probabilities


def test_suspects__are_cleanlabs(noisy):
    given, probabilities = noisy
    suspects = find_suspects(given, probabilities)
    issues = find_label_issues(given, probabilities, filter_by="confident_learning", n_jobs=1)
    np.testing.assert_array_equal(suspects.is_issue, issues)
    assert 20 < issues.sum() < 90
    scores = get_label_quality_scores(given, probabilities, method="self_confidence")
    np.testing.assert_array_equal(suspects.order, np.argsort(scores, kind="stable"))
    margins = get_label_quality_scores(given, probabilities, method="normalized_margin")
    np.testing.assert_allclose((suspects.margin + 1) / 2, margins)


def test_suspects__class_without_rows_is_never_confident(noisy):
    given, probabilities = noisy
    wider = np.hstack([np.zeros((600, 1)), probabilities])
    for name in ("is_issue", "order", "self_confidence"):
        np.testing.assert_array_equal(
            getattr(find_suspects(given + 1, wider), name), getattr(find_suspects(given, probabilities), name)
        )


def test_suspects__of_turned_labels_come_first(make_table, blobs):
    features, labels = blobs
    turned = np.array([3, 40, 77])
    given = labels.copy()
    given[turned] = (given[turned] + 1) % 3
    table = make_table(features, given)
    held = out_of_fold(table, partial(fit_head, C=0.1), seed=0)
    suspects = find_suspects(given[held.rows], softmax(held.logits))
    assert set(held.rows[suspects.order[:3]]) == set(turned)
    # Row 40 is suspicious too, but not as sure of its class as the mean row there.
    assert set(np.flatnonzero(suspects.is_issue)) == {3, 77}
    np.testing.assert_array_equal(suspects.suggested[turned], labels[turned])


def test_write_suspects__has_every_row_the_worst_first(tmp_path):
    suspects = find_suspects(GIVEN, PROBABILITIES)
    paths = ["a, b.png", "b.png", "caf\udce9.png", "d.png", "e.png", "f.png"]
    write_suspects(tmp_path / "s.csv", suspects, paths=paths, class_names=("ant", "bee", "cat"))
    with open(tmp_path / "s.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["path", "label", "suggested_label", "self_confidence", "margin", "rank", "is_issue"]
    assert list(lines[0].values()) == ["caf\udce9.png", "ant", "bee", "0.1", "-0.6", "1", "1"]
    assert [line["path"] for line in lines] == [paths[row] for row in (2, 5, 4, 3, 1, 0)]
    assert [line["rank"] for line in lines] == list("123456")
