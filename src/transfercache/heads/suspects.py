"""Label errors by confident learning: which labels do heads that have not seen them believe least?

Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021) 1373-1411.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfercache.arrays import BoolArray, Float64Array, Int64Array
from transfercache.files import replacing

COLUMNS = ("path", "label", "suggested_label", "self_confidence", "margin", "rank", "is_issue")


@dataclass(frozen=True, eq=False)
class Suspects:
    """N labelled rows with what was predicted of each out of fold."""

    given: Int64Array  # [N]
    suggested: Int64Array  # [N], the most probable class
    self_confidence: Float64Array  # [N], the probability of the given label
    margin: Float64Array  # [N], that less the largest other one, from -1 to 1
    is_issue: BoolArray  # [N], confidently of another class
    order: Int64Array  # [N], the most suspicious row first


def find_suspects(given: Int64Array, probabilities: Float64Array) -> Suspects:
    """Rank the labels `given` [N] by the out-of-fold `probabilities` [N, C] of each, the lowest first (ties: in order).

    An issue lies off the diagonal of the confident joint (the paper's equation 1): among the classes whose probability
    reaches their threshold, the mean probability of the class over the rows so labelled, the most probable one is not
    the given one; nor is the given one the most probable of all, as in the authors' cleanlab. Self-confidence ranks,
    not the margin: on scikit-learn's digits it found more (docs/statistics.md), and for two classes they are the same.
    """
    n_rows, n_classes = probabilities.shape
    rows = np.arange(n_rows)
    self_confidence = probabilities[rows, given]
    others = probabilities.copy()
    others[rows, given] = -np.inf
    n_given = np.bincount(given, minlength=n_classes)
    sums = np.bincount(given, weights=self_confidence, minlength=n_classes)
    # Of a class without rows nothing is ever confident.
    thresholds = np.divide(sums, n_given, out=np.full(n_classes, np.inf), where=n_given > 0)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = probabilities.argmax(axis=1)
    is_off_diagonal = (confident.max(axis=1) >= 0) & (confident.argmax(axis=1) != given)
    return Suspects(
        given=given,
        suggested=suggested,
        self_confidence=self_confidence,
        margin=self_confidence - others.max(axis=1),
        is_issue=is_off_diagonal & (suggested != given),
        order=np.argsort(self_confidence, kind="stable"),
    )


def write_suspects(path: Path, suspects: Suspects, *, paths: Sequence[str], class_names: Sequence[str]) -> None:
    """Write a CSV, the most suspicious row first; with its column `label` mended it is a file for `--labels`.

    `paths` [N] are the rows' own. Raises ResourceError where `path` cannot be written.
    """
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rank, row in enumerate(suspects.order.tolist(), 1):
            names = (class_names[suspects.given[row]], class_names[suspects.suggested[row]])
            scores = (f"{suspects.self_confidence[row]:.6g}", f"{suspects.margin[row]:.6g}")
            writer.writerow((paths[row], *names, *scores, rank, int(suspects.is_issue[row])))
