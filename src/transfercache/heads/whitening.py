"""The curvature of a softmax loss as far as the columns' correlations tell it: where L-BFGS begins."""

from __future__ import annotations

import numpy as np

from transfercache.heads.problem import Float64Array, Problem
from transfercache.heads.standardise import Standardised
from transfercache.randomness import derive_rng

#: Rows that the correlations are taken from, for each column: more changed no count of passes.
ROWS_PER_COLUMN = 16


class Whitening:
    """Of class k the block (q_k A + l2)^-1, with the correlations A = V diag(e) V' of the standardised columns.

    The Hessian's block of class k is the mean of p_k (1 - p_k) x x'; q_k stands for that of p_k (1 - p_k), which
    Böhning 1992 bounds by a constant. Embeddings are correlated: on real ones this halves the passes, on made ones
    without correlations it changes little (docs/experiments.md).
    """

    def __init__(self, problem: Problem) -> None:
        n_rows, dim = problem.blocks.shape
        n_sampled = min(n_rows, ROWS_PER_COLUMN * dim)
        # Sorted: rows of a file are then read in order.
        chosen = np.sort(derive_rng(problem.settings.seed, "whitening").permutation(n_rows)[:n_sampled])
        x = Standardised(problem.blocks.take(chosen), np.float32).read(0, n_sampled)
        values, vectors = np.linalg.eigh((x.T @ x).astype(np.float64) / n_sampled)
        # In float32: it says where to look, not where the optimum is.
        self._values, self._vectors = values.clip(0), vectors.astype(np.float32)

    def apply(self, gradient: Float64Array, *, curvature: Float64Array, l2: float) -> Float64Array:
        """Return the blocks times a gradient [K, D + 1]; `curvature` [K] is q, the last column the intercepts'."""
        turned = gradient[:, :-1].astype(np.float32) @ self._vectors
        turned /= (curvature[:, None] * self._values + l2).astype(np.float32)
        product = np.empty(gradient.shape)
        product[:, :-1] = turned @ self._vectors.T
        product[:, -1] = gradient[:, -1] / curvature
        return product
