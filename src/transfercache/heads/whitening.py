"""The curvature of a softmax loss as far as the columns' correlations tell it: where L-BFGS begins."""

from __future__ import annotations

import math

import numpy as np

from transfercache.arrays import Float64Array
from transfercache.heads.problem import Problem
from transfercache.heads.standardise import Standardised
from transfercache.randomness import derive_rng

#: Rows that the correlations are taken from, for each column: more changed no count of passes.
ROWS_PER_COLUMN = 16
#: s, the share of a class's own rows: half near certainty, but the uncertain ones among them lie less far out. Where
#: the mean loss stays high it is next to nothing: exp(-loss) is the probability of a row's own class, and this power of
#: it came within a third of the passes of each case's own best share (docs/experiments.md).
OWN_SHARE, OWN_POWER = 0.25, 8


class Whitening:
    """Of class k the block (q_k (A + s m m') + l2)^-1, with the correlations A = V diag(e) V' of the columns.

    The Hessian's block of class k is the mean of p_k (1 - p_k) x x'; q_k stands for that of p_k (1 - p_k), which
    Böhning 1992 bounds by a constant. Near certainty half of that mean is over the class's own rows, which all lie
    about their mean m: the longest direction by far. Passes: docs/experiments.md.
    """

    def __init__(self, problem: Problem) -> None:
        n_rows, dim = problem.blocks.shape
        n_sampled = min(n_rows, ROWS_PER_COLUMN * dim)
        # Sorted: rows of a file are then read in order.
        chosen = np.sort(derive_rng(problem.seed, "whitening").permutation(n_rows)[:n_sampled])
        x = Standardised(problem.blocks.take(chosen), np.float32).read(0, n_sampled)
        values, vectors = np.linalg.eigh((x.T @ x).astype(np.float64) / n_sampled)
        # In float32: it says where to look, not where the optimum is.
        self._values, self._vectors = values.clip(0), vectors.astype(np.float32)
        by_class = np.argsort(problem.targets[chosen], kind="stable")
        present, starts = np.unique(problem.targets[chosen][by_class], return_index=True)
        means = np.zeros((problem.n_targets, dim), np.float32)
        for target, own in zip(present, np.split(by_class, starts[1:]), strict=True):
            means[target] = x[own].mean(axis=0)
        self._means = means @ self._vectors  # [K, D]

    def apply(self, gradient: Float64Array, *, curvature: Float64Array, mean_loss: float, l2: float) -> Float64Array:
        """Return the blocks times a gradient [K, D + 1]; `curvature` [K] is q, the last column the intercepts'."""
        own_share = OWN_SHARE * math.exp(-OWN_POWER * mean_loss)
        q = curvature[:, None].astype(np.float32)
        block = q * self._values.astype(np.float32) + np.float32(l2)  # [K, D]
        turned = gradient[:, :-1].astype(np.float32) @ self._vectors
        turned /= block
        # Sherman and Morrison's formula.
        along = self._means / block
        bend = own_share * q * (self._means * turned).sum(axis=1, keepdims=True)
        turned -= along * (bend / (1 + own_share * q * (self._means * along).sum(axis=1, keepdims=True)))
        product = np.empty(gradient.shape)
        product[:, :-1] = turned @ self._vectors.T
        product[:, -1] = gradient[:, -1] / curvature
        return product
