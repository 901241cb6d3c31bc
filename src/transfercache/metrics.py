"""What a set of predictions is worth: accuracy with its interval, per-class figures, log loss, ECE. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from transfercache.arrays import BoolArray, Float64Array, Int64Array
from transfercache.errors import DataError
from transfercache.plain import fields_of

AnyFloatArray = npt.NDArray[np.floating[Any]]

#: The 0.975 quantile of the standard normal distribution, for two-sided 95 % intervals.
NORMAL_QUANTILE_95 = 1.959963984540054
#: Of the calibration error: Guo et al. 2017 (section 5) and most others since.
N_CALIBRATION_BINS = 15


def softmax(logits: AnyFloatArray) -> Float64Array:
    """Return float64 [M, C], rows summing to one, for logits [M, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def wilson_interval(n_correct: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    if not 0 <= n_correct <= n or n < 1:
        raise ValueError(f"{n_correct} of {n} is not a proportion")
    z2 = NORMAL_QUANTILE_95**2
    proportion = n_correct / n
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    spread = proportion * (1 - proportion) / n + z2 / (4 * n * n)
    half_width = NORMAL_QUANTILE_95 / (1 + z2 / n) * math.sqrt(spread)
    # At 0 and n correct one end is exactly 0 or 1, but for rounding.
    low = 0.0 if n_correct == 0 else centre - half_width
    return low, 1.0 if n_correct == n else centre + half_width


def predicted_classes(probabilities: Float64Array, *, n_train_per_class: Int64Array) -> Int64Array:
    """Return int64 [M]: the most probable class of probabilities [M, C] that has training rows (ties: the first)."""
    classes: Int64Array = np.where(n_train_per_class > 0, probabilities, -1.0).argmax(axis=1).astype(np.int64)
    return classes


def accuracy(target: Int64Array, predicted: Int64Array) -> float:
    """Return the share of rows [M] predicted right."""
    return float(np.mean(target == predicted))


def confusion(target: Int64Array, predicted: Int64Array, *, n_classes: int) -> Int64Array:
    """Return int64 [C, C]: rows are the target's classes, columns the predicted ones."""
    counts = np.bincount(target * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def recalls(matrix: Int64Array) -> Float64Array:
    """Return float64 [C] from a confusion matrix; NaN for a class that does not occur in the target."""
    return _ratio(np.diagonal(matrix), matrix.sum(axis=1))


def precisions(matrix: Int64Array) -> Float64Array:
    """Return float64 [C] from a confusion matrix; NaN for a class that was never predicted."""
    return _ratio(np.diagonal(matrix), matrix.sum(axis=0))


def balanced_accuracy(matrix: Int64Array) -> float:
    """Return the mean recall over the classes that occur in the target."""
    return float(np.nanmean(recalls(matrix)))


def macro_f1(matrix: Int64Array) -> float:
    """Return the mean F1 over the classes that occur in the target.

    A class that occurs but is never predicted counts as 0; a class that is only predicted has no F1 of its own, its
    rows lower those of the others. Equal to scikit-learn's `f1_score(average="macro", labels=<those classes>)`.
    """
    occurring = matrix.sum(axis=1) > 0
    f1 = _ratio(2 * np.diagonal(matrix), matrix.sum(axis=0) + matrix.sum(axis=1))
    return float(np.mean(f1[occurring]))


def log_loss(given: Float64Array) -> float:
    """Return the mean of -ln p over the rows, p [M] being given to a row's own class and clipped from 0 and 1.

    By float64's epsilon, as in scikit-learn's `log_loss`, so that a row to whose class the probability 0 was given (a
    kNN without a vote for it, a class without training rows) costs 36.04.
    """
    epsilon = np.finfo(np.float64).eps
    return float(-np.mean(np.log(np.clip(given, epsilon, 1 - epsilon))))


def calibration_error(is_right: BoolArray, confidence: Float64Array) -> float:
    """Return the expected calibration error, ECE, of the predicted class (Guo et al. 2017, equation 3).

    Rows are put by `confidence` [M], the probability of the class predicted, into 15 bins of equal width (a, b]; ECE is
    the mean over rows of the distance, in their bin, between mean confidence and the share of `is_right` [M].
    """
    edges = np.linspace(0, 1, N_CALIBRATION_BINS + 1)[1:-1]
    excess = np.bincount(np.searchsorted(edges, confidence), weights=confidence - is_right)
    return float(np.abs(excess).sum() / len(confidence))


def _ratio(part: Int64Array, whole: Int64Array) -> Float64Array:
    return np.asarray(np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0))


@dataclass(frozen=True)
class ClassReport:
    """One class of a report; `recall` and `precision` are None where they would divide by zero."""

    name: str
    n: int
    n_train: int
    recall: float | None
    precision: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the object under `per_class` of the command line's JSON."""
        return {"class": self.name, **fields_of(self, without=("name",))}


@dataclass(frozen=True, eq=False)
class Report:
    """The figures of one set of predictions on one split; `interval` is Wilson's 95 % of the accuracy."""

    split: str
    accuracy: float
    interval: tuple[float, float]
    n: int
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    ece: float  # of the predicted class, in 15 bins: see `calibration_error`
    per_class: tuple[ClassReport, ...]
    confusion: Int64Array  # [C, C], rows are the target's classes

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as they stand under `reported` of the command line's JSON."""
        return fields_of(self)


class Answers(NamedTuple):
    """All that a report needs of probabilities [M, C], which may be too many to hold at once."""

    predicted: Int64Array  # [M], the most probable class that has training rows (ties: the first)
    confidence: Float64Array  # [M], its probability
    given: Float64Array  # [M], the probability of the row's own class

    @classmethod
    def of(cls, target: Int64Array, probabilities: Float64Array, *, n_train_per_class: Int64Array) -> Answers:
        """Return those of some rows."""
        predicted = predicted_classes(probabilities, n_train_per_class=n_train_per_class)
        rows = np.arange(len(target))
        return cls(predicted, probabilities[rows, predicted], probabilities[rows, target])


def evaluate(
    target: Int64Array,
    probabilities: Float64Array,
    *,
    class_names: Sequence[str],
    n_train_per_class: Int64Array,
    split: str,
) -> Report:
    """Report on `target` int64 [M] (0..C-1) against `probabilities` [M, C], kNN's being its vote fractions.

    The predicted class is the most probable one that has training rows (ties: the first), so that a row of a class
    that was never trained on always counts as wrong. Raises DataError where there is no row.
    """
    n_classes = len(class_names)
    if probabilities.shape != (len(target), n_classes) or len(n_train_per_class) != n_classes:
        raise ValueError(f"probabilities {probabilities.shape} do not fit {len(target)} rows of {n_classes} classes")
    if len(target) and (target.min() < 0 or target.max() >= n_classes):
        raise ValueError(f"labels must lie between 0 and {n_classes - 1}")
    answers = Answers.of(target, probabilities, n_train_per_class=n_train_per_class)
    return report_on(target, answers, class_names=class_names, n_train_per_class=n_train_per_class, split=split)


def report_on(
    target: Int64Array, answers: Answers, *, class_names: Sequence[str], n_train_per_class: Int64Array, split: str
) -> Report:
    """Report on answers that were collected block by block; see `evaluate`."""
    if len(target) == 0:
        raise DataError(f"the {split} split has no labelled row, so there is nothing to report; give it some")
    matrix = confusion(target, answers.predicted, n_classes=len(class_names))
    return Report(
        split=split,
        accuracy=accuracy(target, answers.predicted),
        interval=wilson_interval(int(np.trace(matrix)), len(target)),
        n=len(target),
        balanced_accuracy=balanced_accuracy(matrix),
        macro_f1=macro_f1(matrix),
        log_loss=log_loss(answers.given),
        ece=calibration_error(target == answers.predicted, answers.confidence),
        per_class=_per_class(matrix, class_names, n_train_per_class),
        confusion=matrix,
    )


def _per_class(
    matrix: Int64Array, class_names: Sequence[str], n_train_per_class: Int64Array
) -> tuple[ClassReport, ...]:
    columns = (class_names, matrix.sum(axis=1), n_train_per_class, recalls(matrix), precisions(matrix))
    return tuple(
        ClassReport(name, int(n), int(n_train), _or_none(recall), _or_none(precision))
        for name, n, n_train, recall, precision in zip(*columns, strict=True)
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
