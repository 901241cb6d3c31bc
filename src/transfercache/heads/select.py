"""Cross-validation on the training rows: stratified folds that never divide a component, one loss per setting."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from transfercache import config
from transfercache.cache.blocks import in_order
from transfercache.heads.problem import Affine, Chosen, Float64Array, Int64Array, Problem
from transfercache.splits import assign_folds

logger = logging.getLogger(__name__)


class Fold(NamedTuple):
    """Row indices: `train` is fitted, in all views; `held` is scored; they share no component."""

    train: Int64Array
    held: Int64Array


class Selection(NamedTuple):
    """The best of a solver's settings, and how it was found."""

    position: int
    chosen: Chosen


def make_folds(problem: Problem) -> list[Fold]:
    """Return the folds of the problem, `config.N_FOLDS` of them where its classes allow it.

    Fewer where every class has fewer components; none where no class can be held out. A fold whose training part
    would lack a class (components of mixed labels can cause it) is left out.
    """
    fold_of, n_folds = assign_folds(
        problem.targets, problem.component, n_folds=config.N_FOLDS, seed=problem.settings.seed
    )
    folds = [
        Fold(np.flatnonzero(fold_of != k), np.flatnonzero((fold_of == k) & problem.is_scored)) for k in range(n_folds)
    ]
    return [fold for fold in folds if len(np.unique(problem.targets[fold.train])) == problem.n_targets]


def select(problem: Problem, fit_path: Callable[[Problem], Iterator[Affine]], *, name: str) -> Selection | None:
    """Choose among a solver's settings by the lowest mean log loss of held-out rows (ties: the first setting).

    `fit_path` yields one map per setting, in the same order for every fold. It sees the fold's training rows alone,
    so that its standardisation cannot look at a held-out row. Returns None, with a warning that names what is not
    chosen, where no class can be held out.
    """
    folds = make_folds(problem)
    if not folds:
        warn_not_chosen(name)
        return None
    losses = mean_held_out_losses(problem, folds, fit_path)
    chosen = {
        "by": "lowest mean log loss of held-out rows",
        "folds": len(folds),
        "seed": problem.settings.seed,
        "mean_log_loss": losses.tolist(),
    }
    return Selection(int(np.argmin(losses)), chosen)


def warn_not_chosen(name: str) -> None:
    """Say that there is nothing to choose a setting on."""
    logger.warning("%s is not chosen by cross-validation: no class has two images (or groups) to hold out", name)


def mean_held_out_losses(
    problem: Problem, folds: list[Fold], fit_path: Callable[[Problem], Iterator[Affine]]
) -> Float64Array:
    """Return float64 [S]: per setting, the weighted mean over all held-out rows of -ln p(target)."""
    totals = []
    for fold in tqdm(folds, desc="folds", file=sys.stderr, disable=None, leave=False):
        held = problem.subset(fold.held)
        totals.append([_total_loss(fitted, held) for fitted in fit_path(problem.subset(fold.train))])
    n_held = sum(float(problem.row_weights[fold.held].sum()) for fold in folds)
    return np.asarray(np.sum(totals, axis=0) / n_held)


def _total_loss(fitted: Affine, held: Problem) -> float:
    losses = (
        row_losses(fitted.logits(features), held.targets[place]) @ held.row_weights[place]
        for place, features in in_order(held.blocks)
    )
    return float(sum(losses))


def row_losses(logits: Float64Array, targets: Int64Array) -> Float64Array:
    """Return float64 [M]: -ln softmax(logits)[target], from logits [M, K] and without overflow."""
    highest = logits.max(axis=1)
    log_total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return np.asarray(log_total - logits[np.arange(len(targets)), targets])
