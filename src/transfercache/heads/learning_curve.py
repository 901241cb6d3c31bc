"""Heads on parts of the training rows: k images a class, shares of all, other seeds; and what more labels would do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from transfercache.arrays import BoolArray, Float64Array, Int64Array
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import UsageError
from transfercache.heads.select import logger as logger_of_choices
from transfercache.metrics import NORMAL_QUANTILE_95
from transfercache.randomness import derive_rng
from transfercache.splits import majority_labels

#: Of the training images, each twice the one before, so that a step says what twice the labels did.
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
#: A gain below one point of accuracy is called none: labelling as many images again costs more than that is worth.
SMALL_GAIN = 0.01

#: From training rows and a seed to bool [M]: which of the reported images a head trained on those is right about.
Answer = Callable[[FeatureTable, int], BoolArray]
#: From training rows, a size and a generator to the rows of one draw, int64.
Draw = Callable[[FeatureTable, float, np.random.Generator], Int64Array]


@dataclass(frozen=True, eq=False)
class Point:
    """R heads trained on draws of one size, each by a seed of its own."""

    size: float  # images a class, or a share of all images
    n_images: float  # in a draw, in the mean
    is_right: BoolArray  # [R, M]

    @property
    def accuracies(self) -> Float64Array:
        """Those of the R heads, float64 [R]."""
        return np.asarray(self.is_right.mean(axis=1))

    def to_json(self, size: str) -> dict[str, Any]:
        """Return the mean accuracy and its spread over the draws; the size is named by what it is."""
        values = self.accuracies
        return {
            size: self.size,
            "n_train": self.n_images,
            "repeats": len(values),
            "mean": float(values.mean()),
            "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
            "min": float(values.min()),
            "max": float(values.max()),
        }


def measure(
    train: FeatureTable, sizes: Sequence[float], *, draw: Draw, repeats: int, seed: int, answer: Answer
) -> tuple[Point, ...]:
    """Draw, train and answer `repeats` times for each size; a repeat has the same two seeds for every size.

    With `draw_shots` and `draw_share` a draw so holds the smaller ones of its repeat; `draw_share` of 1 moves only the
    seed, which is `seed`, `seed` + 1, and so on.
    """
    points = []
    with _said_once_of_draws(logger_of_choices):
        for size in tqdm(sizes, desc="sizes", file=sys.stderr, disable=None, leave=False):
            is_right, n_images = [], []
            for repeat in range(repeats):
                part = train.subset(draw(train, size, derive_rng(seed, "part", repeat)))
                n_images.append(int(np.sum(part.view == EVAL_VIEW)))
                is_right.append(answer(part, seed + repeat))
            points.append(Point(size, float(np.mean(n_images)), np.stack(is_right)))
    return tuple(points)


@contextmanager
def _said_once_of_draws(logger: logging.Logger) -> Iterator[None]:
    """Let each message of `logger` through once in the block, as one of many heads: none of them is the MODEL's."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in said:
            return False
        said.add(message)
        record.msg = f"in draws of the training images, {record.msg}"
        return True

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def draw_shots(train: FeatureTable, k: float, rng: np.random.Generator) -> Int64Array:
    """Return the rows, all views, of k (whole) images of each class, no two of a class from one component.

    Raises UsageError where a class has fewer components than that.
    """
    k = int(k)
    images = rng.permutation(np.flatnonzero(train.view == EVAL_VIEW))
    # One image of each component and class; then the components of a class in random order, whatever their sizes.
    _, first = np.unique(np.stack([train.labels[images], train.group[images]]), axis=1, return_index=True)
    images = rng.permutation(images[first])
    chosen = []
    for label in np.unique(train.labels):
        of_class = images[train.labels[images] == label]
        if len(of_class) < k:
            name = train.class_names[label]
            raise UsageError(
                f"--shots {k}: class {name!r} has {len(of_class)} training images (or groups) to draw from"
            )
        chosen.append(of_class[:k])
    return np.flatnonzero(np.isin(train.row, train.row[np.concatenate(chosen)]))


def draw_share(train: FeatureTable, fraction: float, rng: np.random.Generator) -> Int64Array:
    """Return the rows, all views, of this share of each class's images.

    Whole components in random order until the share is reached, at least one; a component counts for the class of most
    of its images.
    """
    is_image = train.view == EVAL_VIEW
    components, first, index = np.unique(train.group, return_index=True, return_inverse=True)
    n_images = np.bincount(index[is_image], minlength=len(components))
    label_of = majority_labels(train.labels, train.group)[first]
    order = rng.permutation(len(components))
    before = np.zeros(len(components))  # the share of its class's images that was drawn before each
    for label in np.unique(label_of):
        members = order[label_of[order] == label]
        total = np.cumsum(n_images[members])
        before[members] = (total - n_images[members]) / total[-1]
    return np.flatnonzero(before[index] < fraction)


@dataclass(frozen=True)
class Gain:
    """What the last doubling of the training images brought in accuracy, with a 95 % interval; and so, would more?"""

    n_from: float
    n_to: float
    value: float
    interval: tuple[float, float]

    @property
    def answer(self) -> str:
        """`yes`: it brought something; `no`: less than `SMALL_GAIN`; `unclear`: the reported images cannot tell."""
        low, high = self.interval
        if low > 0:
            return "yes"
        return "no" if high < SMALL_GAIN else "unclear"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `answer` is to the question whether more labels would help."""
        return {
            "n_from": self.n_from,
            "n_to": self.n_to,
            "gain": self.value,
            "interval": list(self.interval),
            "answer": self.answer,
        }


def last_gain(curve: tuple[Point, ...]) -> Gain:
    """Compare the last two points of a curve on the same images.

    The interval takes in both what another draw would change and what other images would: the variance of the mean over
    R draws and of that over M images are added, and a half-width gets 1 / M more for continuity, as for any paired
    difference of proportions (Fleiss 1981, section 8.1).
    """
    fewer, more = curve[-2:]
    by_draw = more.accuracies - fewer.accuracies
    by_image = more.is_right.mean(axis=0) - fewer.is_right.mean(axis=0)
    variance = sum(float(np.var(by, ddof=1)) / len(by) if len(by) > 1 else np.inf for by in (by_draw, by_image))
    value = float(by_draw.mean())
    half = NORMAL_QUANTILE_95 * variance**0.5 + 1 / len(by_image)
    return Gain(fewer.n_images, more.n_images, value, (max(-1.0, value - half), min(1.0, value + half)))
