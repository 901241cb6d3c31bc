"""Ridge regression on one-hot targets: the whole path of penalties, and its cross-validation, from one pass.

Rows enter through their moments alone, and each fold keeps its own: what a fold is trained on are the moments of all
the others, and its held-out squared error is a quadratic form in its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from transfercache.arrays import Float32Array, Float64Array, Int64Array
from transfercache.cache.blocks import BLOCK_ROWS
from transfercache.heads.calibration import fit_temperature
from transfercache.heads.problem import Affine, Chosen, Problem
from transfercache.heads.select import Fold, make_folds, warn_not_chosen
from transfercache.heads.standardise import least_deviation
from transfercache.heads.threads import one_blas_thread, share_rows
from transfercache.randomness import derive_rng

#: Penalties a row, l2 = 1 / (C n), the strongest first; the eigenvalues of standardised features are 1 in the mean.
L2_GRID = tuple(float(l2) for l2 in np.logspace(2, -6, 17))
#: Where no class can be held out.
DEFAULT_L2 = 0.1
#: Logits of held-out rows that the one number is fitted on by which they are scaled.
MAX_SCALE_LOGITS = 2_000_000


@dataclass(eq=False)
class Moments:
    """Weighted sums over rows x with one-hot targets y; x is relative to `_Sums.origin`, so that little cancels."""

    n: float
    x: Float64Array  # [D]
    y: Float64Array  # [K]
    xx: Float64Array  # [D, D]
    yx: Float64Array  # [K, D]

    @classmethod
    def zero(cls, n_targets: int, dim: int) -> Moments:
        """Return those of no rows."""
        return cls(0.0, np.zeros(dim), np.zeros(n_targets), np.zeros((dim, dim)), np.zeros((n_targets, dim)))

    def add(self, other: Moments, sign: int = 1) -> Moments:
        """Return the moments of both sets of rows; with sign -1 of these without the others."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("n", "x", "y", "xx", "yx"))
        return Moments(*(mine + sign * others for mine, others in pairs))

    def squared_error(self, fitted: Affine) -> float:
        """Return sum_i w_i |y_i - R x_i - b|^2."""
        weight, bias = fitted.weight, fitted.bias
        explained = np.vdot(weight, self.yx) + bias @ self.y
        size = np.vdot(weight @ self.xx, weight) + 2 * bias @ (weight @ self.x) + self.n * bias @ bias
        return float(self.n - 2 * explained + size)

    def path(self, penalties: Sequence[float], origin: Float32Array) -> Iterator[Affine]:
        """Yield the map for each l2: the minimum of the mean squared error plus l2 |W|^2 on standardised columns.

        With the correlations A = V diag(e) V' of the columns and B [K, D] those of targets with columns, W is
        B V diag(1 / (e + l2)) V' (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 3.47).
        """
        mean, share = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - np.outer(mean, mean)
        deviation = np.sqrt(np.diagonal(covariance).clip(0))
        # By infinity a constant column comes to exactly nothing; what rounding left of it would get a weight.
        deviation = np.where(deviation > least_deviation(mean + origin), deviation, np.inf)
        values, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        targets = (self.yx / self.n - np.outer(share, mean)) / deviation @ vectors  # [K, D]
        for l2 in penalties:
            weight = targets / (values.clip(0) + l2) @ vectors.T / deviation
            yield Affine(weight, share - weight @ mean)


def fit_ridge(problem: Problem) -> tuple[Affine, Chosen]:
    """Fit the squared error with `C`, or with the l2 of `L2_GRID` of lowest mean held-out squared error.

    C is 1 / (l2 sum_i w_i), so that C = 1 / alpha of scikit-learn's Ridge on standardised features. Logits are the
    regression's values times one number, fitted by the log loss of held-out rows: squared error alone leaves them
    between 0 and 1.
    """
    with one_blas_thread():
        folds = make_folds(problem)
        first = problem.blocks.read(0, min(BLOCK_ROWS, len(problem.targets)))
        origin = first.mean(axis=0, dtype=np.float64).astype(np.float32)
        parts = _moments_by_part(problem, folds, origin)
        total = reduce(Moments.add, parts)
        others = [total.add(parts[2 * k + 2], -1).add(parts[2 * k + 3], -1) for k in range(len(folds))]
        l2, chosen = _choose(problem, others, parts[3::2], origin)
        fitted = next(total.path([l2], origin))
        scale = _logit_scale(problem, folds, [next(part.path([l2], origin)) for part in others], fitted, origin)
    raw = Affine(scale * fitted.weight, scale * (fitted.bias - fitted.weight @ origin))
    C = 1 / (l2 * float(problem.row_weights.sum()))
    return raw, {"C": C, **chosen, "l2": l2, "logit_scale": scale, "standardised": True, "passes": 1}


def _choose(problem: Problem, others: list[Moments], held: list[Moments], origin: Float32Array) -> tuple[float, Chosen]:
    """Return l2 and how it was chosen, from what each fold is trained on and its held-out rows that are scored."""
    n = float(problem.row_weights.sum())
    if problem.C is not None:
        return 1 / (problem.C * n), {"by": "given"}
    if not held:
        warn_not_chosen("C")
        return DEFAULT_L2, {"by": "default: no class can be held out"}
    totals = [
        [mine.squared_error(fitted) for fitted in part.path(L2_GRID, origin)]
        for part, mine in zip(others, held, strict=True)
    ]
    errors = np.sum(totals, axis=0) / sum(mine.n for mine in held)
    return L2_GRID[int(np.argmin(errors))], {
        "by": "lowest mean squared error of held-out rows",
        "folds": len(held),
        "seed": problem.seed,
        "mean_squared_error": errors.tolist(),
        "grid": [1 / (l2 * n) for l2 in L2_GRID],
    }


def _moments_by_part(problem: Problem, folds: list[Fold], origin: Float32Array) -> list[Moments]:
    """Return the moments of rows in no fold, then of each fold; of each the rows that are not scored, then the scored.

    One pass. Products are float32 within a block and part, sums over them float64.
    """
    n_rows, dim = problem.blocks.shape
    part = problem.is_scored.astype(np.int64)  # [N]
    for k, fold in enumerate(folds):
        is_train = np.zeros(n_rows, dtype=bool)
        is_train[fold.train] = True
        part[~is_train] += 2 * k + 2

    def add_up(blocks: list[slice]) -> list[Moments]:
        sums = [Moments.zero(problem.n_targets, dim) for _ in range(2 * len(folds) + 2)]
        for block in blocks:
            x = problem.blocks.read(block.start, block.stop) - origin
            _add_block(sums, x, part[block], problem.targets[block], problem.row_weights[block])
        return sums

    by_thread = share_rows(n_rows, n_rows * dim * dim, add_up)
    return [reduce(Moments.add, sums) for sums in zip(*by_thread, strict=True)]


def _add_block(
    sums: list[Moments], x: Float32Array, part: Int64Array, targets: Int64Array, row_weights: Float64Array
) -> None:
    """Add rows x [B, D] to the moments of their parts; sorted by part and target, each is a run."""
    order = np.lexsort((targets, part))
    for number in np.unique(part).tolist():
        rows = order[part[order] == number]
        into, own, target = sums[number], x[rows], targets[rows]
        weighted = own * row_weights[rows, None].astype(own.dtype)
        starts = np.flatnonzero(np.diff(target, prepend=-1))
        into.n += float(row_weights[rows].sum())
        into.x += weighted.sum(axis=0, dtype=np.float64)
        into.y += np.bincount(target, row_weights[rows], len(into.y))
        into.xx += weighted.T @ own
        into.yx[target[starts]] += np.add.reduceat(weighted, starts, axis=0)


def _logit_scale(
    problem: Problem, folds: list[Fold], by_fold: list[Affine], fitted: Affine, origin: Float32Array
) -> float:
    """Return by what to multiply the regression's values, from rows held out of them, or from all where none can be."""
    pairs = [(fold.held, affine) for fold, affine in zip(folds, by_fold, strict=True)]
    pairs = pairs or [(np.flatnonzero(problem.is_scored), fitted)]
    share = min(1.0, MAX_SCALE_LOGITS / problem.n_targets / sum(len(rows) for rows, _ in pairs))
    rng = derive_rng(problem.seed, "scale")
    values, targets = [], []
    for rows, affine in pairs:
        chosen = np.sort(rng.permutation(rows)[: math.ceil(share * len(rows))])
        x = problem.blocks.take(chosen).read(0, len(chosen)) - origin
        values.append(affine.logits(x))
        targets.append(problem.targets[chosen])
    z, target = np.concatenate(values), np.concatenate(targets)
    margin = float(np.mean(z[np.arange(len(z)), target] - z.mean(axis=1)))
    # A first guess that lets the target's probability be about a half; the temperature is looked for near it.
    guess = (1 + math.log(problem.n_targets)) / margin if margin > 0 else 1.0
    temperature = fit_temperature((guess * z).astype(np.float32), target)
    return guess / temperature if temperature else guess
