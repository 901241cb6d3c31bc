"""One set of rows, and every head that a command trains on it: the one it keeps, and those that tell about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from transfercache.arrays import BoolArray, Int64Array
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.commands.head_result import Calibration
from transfercache.errors import DataError, UsageError
from transfercache.heads.calibration import fit_temperature
from transfercache.heads.fit import KNN
from transfercache.heads.knn import Neighbours
from transfercache.heads.learning_curve import FRACTIONS, Draw, Point, draw_share, draw_shots, measure
from transfercache.heads.linear_head import LinearHead
from transfercache.heads.select import OutOfFold, out_of_fold
from transfercache.metrics import Answers, Report, report_on
from transfercache.randomness import derive_rng
from transfercache.splits import Split

#: Probabilities that are held at once: 128 MiB.
_MAX_PROBABILITIES = 1 << 24


class Parts(NamedTuple):
    """Draws from the training rows: of each size, `repeats` of them."""

    sizes: tuple[float, ...]
    draw: Draw
    repeats: int


def parse_parts(
    shots: str | Sequence[int] | None, *, learning_curve: bool, seeds: int, repeats: int
) -> dict[str, Parts]:
    """Return what is to be measured, under the name of its flag; raises UsageError for a count that is too small."""
    if seeds < 1 or repeats < 2:
        raise UsageError(f"--seeds {seeds} must be at least 1, and --repeats {repeats} at least 2")
    parts = {}
    if shots is not None:
        parts["shots"] = Parts(_parse_shots(shots), draw_shots, repeats)
    if learning_curve:
        parts["learning_curve"] = Parts(FRACTIONS, draw_share, repeats)
    if seeds > 1:
        parts["seeds"] = Parts((1.0,), draw_share, seeds)
    return parts


def _parse_shots(shots: str | Sequence[int]) -> tuple[int, ...]:
    try:
        counts = sorted({int(str(word)) for word in (shots.split(",") if isinstance(shots, str) else shots)})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise UsageError(f"--shots {shots!r} must be numbers of images a class, joined by commas, such as 1,2,5,10")
    return tuple(counts)


@dataclass(frozen=True, eq=False)
class Trial:
    """The rows that train and those that are reported, and how a head is made of the former."""

    train: FeatureTable
    reported: FeatureTable | None  # with --tta in all views, else in view 0; None: no labelled row
    solver: str
    fit: Callable[..., LinearHead]  # of a FeatureTable, C and seed

    def check_parts(self, parts: Mapping[str, Parts]) -> None:
        """Raise DataError where no row can be reported, UsageError where there are too few to draw."""
        for part in parts.values():
            self.reported_rows()
            part.draw(self.train, max(part.sizes), derive_rng(0))

    def reported_rows(self) -> FeatureTable:
        """Return the reported rows; raises DataError where there are none."""
        if self.reported is None:
            raise DataError("no labelled image is in a test or val split, so no accuracy can be told; label some")
        return self.reported

    def fit_rows(self, train: FeatureTable, *, C: str | float | None, seed: int) -> LinearHead | Neighbours:
        """Fit a head to `train`, whose own rows choose what C leaves open; kNN keeps them."""
        return Neighbours.of(train) if self.solver == KNN else self.fit(train, C=C, seed=seed)

    def out_of_fold(self, head: LinearHead, *, seed: int) -> OutOfFold:
        """Hold every training image out once, with the C of `head`; what else a solver chooses, each fold chooses."""
        return out_of_fold(self.train, partial(self.fit, C=head.chosen.get("C"), seed=seed), seed=seed)

    def calibrate(self, head: LinearHead, held: OutOfFold) -> tuple[LinearHead, Calibration]:
        """Return `head` with the temperature that fits the held-out images, and its figures without."""
        fitted = fit_temperature(held.logits, self.train.labels[held.rows])
        before = self.report(head)
        calibration = Calibration(
            temperature=1.0 if fitted is None else fitted,
            is_fitted=fitted is not None,
            n=len(held.rows),
            uncalibrated_log_loss=None if before is None else before.log_loss,
            uncalibrated_ece=None if before is None else before.ece,
        )
        return replace(head, temperature=calibration.temperature), calibration

    def report(self, fitted: LinearHead | Neighbours) -> Report | None:
        """Return the figures of a head, or of kNN, on the reported images; None where there are none."""
        if self.reported is None:
            return None
        return report_on(
            _image_labels(self.reported),
            _answers(fitted, self.train, self.reported),
            class_names=self.train.class_names,
            n_train_per_class=_images_per_class(self.train),
            split=Split(self.reported.split[0]).name.lower(),
        )

    def measure(self, parts: Parts, *, C: str | float | None, seed: int) -> tuple[Point, ...]:
        """Train on each draw, in settings that its own rows choose, and see which reported images come out right."""
        reported = self.reported_rows()

        def answer(train: FeatureTable, seed: int) -> BoolArray:
            answers = _answers(self.fit_rows(train, C=C, seed=seed), train, reported)
            return np.asarray(answers.predicted == _image_labels(reported))

        return measure(self.train, parts.sizes, draw=parts.draw, repeats=parts.repeats, seed=seed, answer=answer)


def _answers(fitted: LinearHead | Neighbours, train: FeatureTable, reported: FeatureTable) -> Answers:
    """Return what is predicted, in the mean over the views of each reported image."""
    first = np.append(np.flatnonzero(reported.view == EVAL_VIEW), len(reported))  # where each image's views begin
    labels, n_train_per_class = _image_labels(reported), _images_per_class(train)
    n_images = max(1, _MAX_PROBABILITIES // len(train.class_names))
    parts = []
    for start in range(0, len(labels), n_images):
        ends = first[start : start + n_images + 1]
        by_view = fitted.probabilities(reported.blocks.read(int(ends[0]), int(ends[-1])))
        probabilities = np.add.reduceat(by_view, ends[:-1] - ends[0]) / np.diff(ends)[:, None]
        target = labels[start : start + n_images]
        parts.append(Answers.of(target, probabilities, n_train_per_class=n_train_per_class))
    return Answers(*map(np.concatenate, zip(*parts, strict=True)))


def _image_labels(table: FeatureTable) -> Int64Array:
    labels: Int64Array = table.labels[table.view == EVAL_VIEW]
    return labels


def _images_per_class(table: FeatureTable) -> Int64Array:
    return np.bincount(_image_labels(table), minlength=len(table.class_names))
