"""Cross-validation on the training rows: stratified folds that never divide a component, one loss per setting.

And, in settings already chosen, what heads say of rows that they have not seen.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from transfercache import config
from transfercache.arrays import BoolArray, Float32Array, Float64Array, Int64Array
from transfercache.cache.blocks import in_order
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import DataError
from transfercache.heads.linear_head import LinearHead
from transfercache.heads.problem import Affine, Chosen, Problem
from transfercache.splits import assign_folds

logger = logging.getLogger(__name__)

Setting = TypeVar("Setting")
#: From rows of a table to a head of them, in settings already chosen.
Fit = Callable[[FeatureTable], LinearHead]


class Fold(NamedTuple):
    """Row indices: `train` is fitted, in all views; `held` is scored; they share no component."""

    train: Int64Array
    held: Int64Array


def make_folds(problem: Problem) -> list[Fold]:
    """Return the folds of a problem; see `divide_folds`."""
    return divide_folds(problem.targets, problem.component, problem.is_scored, seed=problem.seed)


def divide_folds(labels: Int64Array, component: Int64Array, is_scored: BoolArray, *, seed: int) -> list[Fold]:
    """Return the folds of these rows, `config.N_FOLDS` of them where the classes allow it.

    Fewer where every class has fewer components; none where no class can be held out. A fold whose training part
    would lack a class (components of mixed labels can cause it) is left out.
    """
    fold_of, n_folds = assign_folds(labels, component, n_folds=config.N_FOLDS, seed=seed)
    folds = [Fold(np.flatnonzero(fold_of != k), np.flatnonzero((fold_of == k) & is_scored)) for k in range(n_folds)]
    n_classes = len(np.unique(labels))
    return [fold for fold in folds if len(np.unique(labels[fold.train])) == n_classes]


def select(
    problem: Problem,
    fit_path: Callable[[Problem], Iterator[Affine]],
    *,
    name: str,
    grid: Sequence[Setting],
    default: Setting,
    given: Setting | None = None,
    noted: Chosen | None = None,
    patience: int | None = None,
) -> tuple[Setting, Chosen]:
    """Return a solver's setting, and how it was chosen; by cross-validation, with what is to be `noted` then.

    It is the one `given`, else that of `grid` of lowest mean log loss of held-out rows (ties: the first), else the
    `default`, with a warning that names what is not chosen, where no class can be held out. `fit_path` yields one map
    per setting, in the grid's order for every fold. It sees the fold's training rows alone, so that its standardisation
    cannot look at a held-out row. With `patience`, for a grid along which the loss falls and then rises, settings are
    not tried, and named, once it has risen so many times in a row.
    """
    if given is not None:
        return given, {"by": "given"}
    folds = make_folds(problem)
    if not folds:
        warn_not_chosen(name)
        return default, {"by": "default: no class can be held out"}
    losses = mean_held_out_losses(problem, folds, fit_path, patience=patience)
    if len(losses) < len(grid) and int(np.argmin(losses)) == len(losses) - 1:  # the first fold is not like the others
        losses = mean_held_out_losses(problem, folds, fit_path)
    chosen = {
        "by": "lowest mean log loss of held-out rows",
        "folds": len(folds),
        "seed": problem.seed,
        "mean_log_loss": losses.tolist(),
    }
    if len(losses) < len(grid):
        chosen["not_tried"] = list(grid[len(losses) :])
    return grid[int(np.argmin(losses))], {**chosen, **(noted or {})}


def warn_not_chosen(name: str) -> None:
    """Say that there is nothing to choose a setting on."""
    logger.warning("%s is not chosen by cross-validation: no class has two images (or groups) to hold out", name)


def mean_held_out_losses(
    problem: Problem,
    folds: list[Fold],
    fit_path: Callable[[Problem], Iterator[Affine]],
    *,
    patience: int | None = None,
) -> Float64Array:
    """Return float64 [S]: per setting, the weighted mean over all held-out rows of -ln p(target).

    With `patience` S ends where that of the first fold has risen so many times in a row.
    """
    totals: list[list[float]] = []
    for fold in tqdm(folds, desc="folds", file=sys.stderr, disable=None, leave=False):
        held, losses = problem.subset(fold.held), list[float]()
        for fitted in itertools.islice(fit_path(problem.subset(fold.train)), len(totals[0]) if totals else None):
            losses.append(_total_loss(fitted, held))
            if not totals and patience and _has_risen(losses[-patience - 1 :], patience):
                break
        totals.append(losses)
    n_held = sum(float(problem.row_weights[fold.held].sum()) for fold in folds)
    return np.asarray(np.sum(totals, axis=0) / n_held)


def _has_risen(losses: list[float], times: int) -> bool:
    return len(losses) > times and all(later > earlier for earlier, later in itertools.pairwise(losses))


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


class OutOfFold(NamedTuple):
    """Images of a table that could be held out, in its order, and what a head without them says of each."""

    rows: Int64Array  # [M], indices of the table, view 0
    logits: Float32Array  # [M, C]


def out_of_fold(table: FeatureTable, fit: Fit, *, seed: int) -> OutOfFold:
    """Fit each fold's training rows, all views, and return the logits of the images held out of it.

    The folds are those of the choice of C by the same seed, where that was on all rows. An image whose component holds
    all that there is of a class is never held out, nor is one whose fold would lack a class. Raises DataError where
    that leaves none.
    """
    folds = divide_folds(table.labels, table.group, table.view == EVAL_VIEW, seed=seed)
    if not folds:
        raise DataError("no class has two images (or groups), one of which could be held out; add images")
    logits = [
        fit(table.subset(fold.train)).logits(table.subset(fold.held).features)
        for fold in tqdm(folds, desc="held out", file=sys.stderr, disable=None, leave=False)
    ]
    rows = np.concatenate([fold.held for fold in folds])
    order = np.argsort(rows)
    return OutOfFold(rows[order], np.concatenate(logits)[order])
