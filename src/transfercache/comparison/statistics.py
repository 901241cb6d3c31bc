"""What the same rows say about two strategies: the paired difference, its interval, the exact test; and break-even."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from transfercache.arrays import BoolArray
from transfercache.metrics import wilson_interval


class PairedCounts(NamedTuple):
    """How many rows both strategies got right, only a, only b, neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def n(self) -> int:
        """All rows."""
        return sum(self)

    @property
    def difference(self) -> float:
        """Accuracy of a less that of b."""
        return (self.only_a - self.only_b) / self.n


def count_pairs(a_is_right: BoolArray, b_is_right: BoolArray) -> PairedCounts:
    """Cross two bool [M] of the same rows; raises ValueError where there is none, or they are not as many."""
    if a_is_right.shape != b_is_right.shape or not a_is_right.size:
        raise ValueError(f"{a_is_right.shape} and {b_is_right.shape} rows cannot be paired")
    return PairedCounts(
        both=int(np.sum(a_is_right & b_is_right)),
        only_a=int(np.sum(a_is_right & ~b_is_right)),
        only_b=int(np.sum(~a_is_right & b_is_right)),
        neither=int(np.sum(~a_is_right & ~b_is_right)),
    )


def difference_interval(counts: PairedCounts) -> tuple[float, float]:
    """Return the 95 % interval of `counts.difference`: method 10 of Newcombe 1998, Stat. Med. 17, 2635-2650.

    The distances of the two Wilson limits are squared and added, less twice their product times the correlation of
    the two strategies' successes, which is corrected for continuity where it is positive.
    """
    n_a, n_b = counts.both + counts.only_a, counts.both + counts.only_b
    a, b = n_a / counts.n, n_b / counts.n
    (a_low, a_high), (b_low, b_high) = wilson_interval(n_a, counts.n), wilson_interval(n_b, counts.n)
    phi = _corrected_phi(counts)
    return (
        counts.difference - _joined(a - a_low, b_high - b, phi),
        counts.difference + _joined(a_high - a, b - b_low, phi),
    )


def _joined(first: float, second: float, phi: float) -> float:
    # Rounding may leave a perfect correlation of equal distances a hair below zero.
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def _corrected_phi(counts: PairedCounts) -> float:
    n_a, n_b = counts.both + counts.only_a, counts.both + counts.only_b
    product = n_a * (counts.n - n_a) * n_b * (counts.n - n_b)
    if product == 0:
        return 0.0
    determinant = counts.both * counts.neither - counts.only_a * counts.only_b
    corrected = max(determinant - counts.n / 2, 0) if determinant > 0 else determinant
    return corrected / math.sqrt(product)


def mcnemar_p(counts: PairedCounts) -> float:
    """Return the exact two-sided p of McNemar's test: the rows that only one got right, against a fair coin.

    The conditional (binomial) form, in logarithms, so that thousands of such rows neither overflow nor take long.
    """
    n, fewer = counts.only_a + counts.only_b, min(counts.only_a, counts.only_b)
    if n == 0:
        return 1.0
    k = np.arange(1, fewer + 1)
    # log C(n, k) for k = 0..fewer, each from the one before it
    log_terms = np.concatenate([[0.0], np.cumsum(np.log(n - k + 1) - np.log(k))]) - n * math.log(2)
    return min(1.0, 2 * float(np.exp(np.logaddexp.reduce(log_terms))))


def break_even(*, once: float, each: float, against: float) -> int | None:
    """Return from how many experiments on paying `once` and then `each` is no dearer than `against` every time.

    All in seconds. None where `each` is not the smaller: it then never is.
    """
    if each >= against:
        return None
    return max(1, math.ceil(once / (against - each)))
