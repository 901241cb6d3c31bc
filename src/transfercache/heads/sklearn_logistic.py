"""Multinomial logistic regression by scikit-learn's L-BFGS: the reference that `logistic` is held to."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from transfercache.arrays import Float64Array
from transfercache.heads.logistic import C_GRID, DEFAULT_C
from transfercache.heads.problem import Affine, Chosen, Problem
from transfercache.heads.select import select
from transfercache.heads.standardise import Scale
from transfercache.heads.threads import threads_for

logger = logging.getLogger(__name__)

#: Standardised features need 10 to 200 iterations; a fit that takes more separates its classes without a penalty.
MAX_ITERATIONS = 1000


def fit_sklearn(problem: Problem) -> tuple[Affine, Chosen]:
    """Fit standardised features, all in memory, with `C` or the C of `logistic`'s grid that does best.

    The final fit starts from zero, so that it is scikit-learn's own for this C.
    """
    with threads_for(problem.n_multiplications):
        given, noted = problem.C, {"grid": list(C_GRID)}
        C, chosen = select(problem, _fit_path, name="C", given=given, grid=C_GRID, default=DEFAULT_C, noted=noted)
        model = _model(C, warm_start=False)
        fitted = _fit(model, *_standardised(problem), problem)
    n_iterations = int(model.n_iter_.max())
    is_converged = n_iterations < MAX_ITERATIONS
    if not is_converged:
        logger.warning("sklearn with C=%g stopped after %d iterations, before it converged", C, n_iterations)
    return fitted, {"C": C, **chosen, "standardised": True, "iterations": n_iterations, "converged": is_converged}


def _fit_path(problem: Problem) -> Iterator[Affine]:
    """Fit every C of the grid; each starts from the one before, whose optimum is near."""
    scale, x = _standardised(problem)
    model = _model(C_GRID[0], warm_start=True)
    for C in C_GRID:
        yield _fit(model.set_params(C=C), scale, x, problem)


def _standardised(problem: Problem) -> tuple[Scale, Float64Array]:
    scale = Scale.of(problem.blocks)
    return scale, scale.apply(problem.blocks.read(0, problem.blocks.shape[0]))


def _fit(model: LogisticRegression, scale: Scale, x: Float64Array, problem: Problem) -> Affine:
    with warnings.catch_warnings():
        # The final fit says so itself; on the path an unconverged value is scored as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, problem.targets, sample_weight=problem.row_weights)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        # Two classes: sigmoid(z) is the softmax of (-z/2, z/2).
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return scale.fold(weight, bias)


def _model(C: float, *, warm_start: bool) -> LogisticRegression:
    return LogisticRegression(C=C, solver="lbfgs", max_iter=MAX_ITERATIONS, warm_start=warm_start)
