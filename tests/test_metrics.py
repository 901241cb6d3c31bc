"""Figures equal to scikit-learn's and to hand-worked ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics

from transfercache import metrics
from transfercache.errors import DataError
from transfercache.metrics import evaluate

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Targets of three of four classes, and probabilities that are right about half the time."""
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 3], size=200, p=[0.7, 0.25, 0.05])
    logits = rng.standard_normal((200, 4)) + 1.5 * np.eye(4)[target]
    return target, metrics.softmax(logits)


def test_softmax__known_values_without_overflow():
    values = metrics.softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3.0)], [-1e4, 0.0]], np.float64))
    np.testing.assert_allclose(values, [[0.5, 0.5], [0.25, 0.75], [0, 1]], rtol=1e-12)
    assert metrics.softmax(np.zeros((1, 2), np.float32)).dtype == np.float64
    assert metrics.softmax(np.zeros((0, 2), np.float32)).shape == (0, 2)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 10), (10, 10), (145, 153), (1, 3), (500_000, 1_000_000)])
def test_wilson_interval__equals_scipy(n_correct, n):
    from scipy.stats import binomtest

    expected = binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(metrics.wilson_interval(n_correct, n), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval__impossible_counts_are_refused(n_correct, n):
    with pytest.raises(ValueError, match=f"{n_correct} of {n} is not a proportion"):
        metrics.wilson_interval(n_correct, n)


def test_figures__equal_scikit_learns(drawn):
    target, probabilities = drawn
    predicted = probabilities.argmax(axis=1)
    matrix = metrics.confusion(target, predicted, n_classes=4)
    present = [0, 1, 3]
    np.testing.assert_array_equal(matrix, sklearn.metrics.confusion_matrix(target, predicted, labels=range(4)))
    assert metrics.accuracy(target, predicted) == sklearn.metrics.accuracy_score(target, predicted)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = sklearn.metrics.balanced_accuracy_score(target, predicted)
    assert metrics.balanced_accuracy(matrix) == pytest.approx(expected, rel=1e-12)
    f1 = sklearn.metrics.f1_score(target, predicted, average="macro", labels=present)
    assert metrics.macro_f1(matrix) == pytest.approx(f1, rel=1e-12)
    recalls = sklearn.metrics.recall_score(target, predicted, average=None, labels=present)
    precisions = sklearn.metrics.precision_score(target, predicted, average=None, labels=present)
    np.testing.assert_allclose(metrics.recalls(matrix)[present], recalls)
    np.testing.assert_allclose(metrics.precisions(matrix)[present], precisions)
    assert np.isnan(metrics.recalls(matrix)[2])
    loss = sklearn.metrics.log_loss(target, probabilities, labels=range(4))
    assert metrics.log_loss(probabilities[np.arange(200), target]) == pytest.approx(loss, rel=1e-12)


def test_macro_f1__class_never_predicted_counts_as_zero():
    matrix = metrics.confusion(np.array([0, 0, 1]), np.array([0, 0, 0]), n_classes=2)
    assert metrics.macro_f1(matrix) == pytest.approx((2 * 2 / (3 + 2) + 0) / 2)
    assert metrics.precisions(matrix)[0] == pytest.approx(2 / 3)
    assert np.isnan(metrics.precisions(matrix)[1])


def test_log_loss__probability_zero_is_clipped_as_scikit_learn_does():
    target, probabilities = np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]])
    expected = sklearn.metrics.log_loss(target, probabilities)
    assert metrics.log_loss(probabilities[[0, 1], target]) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(36.0437 / 2, rel=1e-4)


@pytest.mark.parametrize("on_an_edge", [False, True])
def test_calibration_error__equals_scikit_learns_reliability_curve(drawn, on_an_edge):
    target, probabilities = drawn
    is_right, confidence = target == probabilities.argmax(axis=1), probabilities.max(axis=1)
    if on_an_edge:
        confidence = np.round(confidence * 15) / 15
    shares, means = sklearn.calibration.calibration_curve(is_right, confidence, n_bins=15, strategy="uniform")
    # It leaves out empty bins, and counts none.
    bins = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence)
    counts = np.unique(bins, return_counts=True)[1]
    expected = counts @ np.abs(shares - means) / len(target)
    assert metrics.calibration_error(is_right, confidence) == pytest.approx(expected, rel=1e-12)
    assert 0.01 < expected < 0.5


def test_calibration_error__hand_worked():
    # Three rows share (0.6, 0.6667], one stands alone in (0.8667, 0.9333] and one in the last bin.
    is_right = np.array([True, False, True, False, True])
    confidence = np.array([0.61, 0.62, 0.66, 0.9, 1.0])
    assert metrics.calibration_error(is_right, confidence) == pytest.approx((abs(2 - 1.89) + 0.9 + 0) / 5)


def test_evaluate__json_has_the_fields_of_the_contract():
    target = np.array([0, 0, 1])
    probabilities = np.array([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.5, 0.25, 0.25]])
    report = evaluate(target, probabilities, class_names=NAMES[:3], n_train_per_class=np.array([7, 5, 2]), split="val")
    low, high = metrics.wilson_interval(1, 3)
    value = report.to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "split": "val",
        "accuracy": 1 / 3,
        "interval": [low, high],
        "n": 3,
        "balanced_accuracy": 0.25,
        "macro_f1": 0.25,
        "log_loss": pytest.approx((np.log(2) + np.log(5) + np.log(4)) / 3),
        # All three are predicted at 0.5, and one of them is right.
        "ece": pytest.approx(abs(3 * 0.5 - 1) / 3),
        "per_class": [
            {"class": "ant", "n": 2, "n_train": 7, "recall": 0.5, "precision": 0.5},
            {"class": "bee", "n": 1, "n_train": 5, "recall": 0.0, "precision": 0.0},
            {"class": "cat", "n": 0, "n_train": 2, "recall": None, "precision": None},
        ],
        "confusion": [[1, 1, 0], [1, 0, 0], [0, 0, 0]],
    }
    assert list(value) == [
        "split", "accuracy", "interval", "n", "balanced_accuracy", "macro_f1", "log_loss", "ece", "per_class",
        "confusion",
    ]  # fmt: skip


def test_evaluate__row_of_a_class_never_trained_on_counts_as_wrong():
    # All probabilities tie, and the untrained class is the first.
    report = evaluate(
        np.array([0, 1]),
        np.full((2, 2), 0.5),
        class_names=("new", "old"),
        n_train_per_class=np.array([0, 9]),
        split="test",
    )
    assert report.confusion.tolist() == [[0, 1], [0, 1]]
    assert report.accuracy == 0.5
    assert report.per_class[0].recall == 0
    assert report.per_class[0].precision is None
    assert report.balanced_accuracy == 0.5


def test_evaluate__no_row_is_an_error_that_names_the_split():
    with pytest.raises(DataError, match="the val split has no labelled row"):
        evaluate(
            np.empty(0, np.int64), np.empty((0, 2)), class_names=NAMES[:2], n_train_per_class=np.ones(2), split="val"
        )


@pytest.mark.parametrize(
    ("target", "n_columns", "message"),
    [([0, 2], 2, "labels must lie between 0 and 1"), ([-1, 0], 2, "labels must lie"), ([0, 1], 3, "do not fit 2 rows")],
)
def test_evaluate__arrays_that_do_not_fit_are_refused(target, n_columns, message):
    with pytest.raises(ValueError, match=message):
        evaluate(
            np.array(target),
            np.full((2, n_columns), 0.5),
            class_names=NAMES[:2],
            n_train_per_class=np.ones(2),
            split="val",
        )
