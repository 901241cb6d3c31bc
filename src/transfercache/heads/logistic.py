"""Multinomial logistic regression of our own: warm-started L-BFGS over fused passes, its C by cross-validation.

scikit-learn's conventions: C sum_i w_i loss_i + |W|^2 / 2 on standardised features, the intercept unpenalised. Divided
by C sum_i w_i, that is the mean loss plus l2 |W|^2 / 2 with l2 = 1 / (C sum_i w_i), which is how it is solved. For two
classes scikit-learn penalises the one vector w of its sigmoid; as softmax that is (-w, w) / 2, and l2 is twice that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from transfercache.arrays import Float64Array, Int64Array
from transfercache.heads.lbfgs import Curvature, Point, minimise
from transfercache.heads.problem import Affine, Chosen, Problem
from transfercache.heads.select import select
from transfercache.heads.softmax_loss import SoftmaxLoss
from transfercache.heads.standardise import Scale, Standardised
from transfercache.heads.threads import MIN_SHARED, one_blas_thread
from transfercache.heads.whitening import Whitening
from transfercache.randomness import derive_rng

logger = logging.getLogger(__name__)

#: From almost the class frequencies to almost no penalty; a factor of ten apart, as LogisticRegressionCV's usual grids.
C_GRID = tuple(float(C) for C in np.logspace(-4, 4, 9))
#: Where no class can be held out: scikit-learn's default.
DEFAULT_C = 1.0
#: Relative gaps to the optimum that are good enough: for the head, by the precision of the rows (1e-8 holds every
#: probability to 1e-4); on a path, to tell values of C a factor of ten apart; for a start on some of the rows, whose
#: own optimum is further away than that, but whose curvature goes with it. These are bounds: gaps in float32 that are
#: bounded by 2e-5 were 1e-6 to 7e-6 of the objective.
GAP = {np.dtype(np.float64): 1e-8, np.dtype(np.float32): 2e-5}
PATH_GAP = {np.dtype(np.float64): 1e-4, np.dtype(np.float32): 3e-3}
START_GAP = 3e-3
#: What still counts as converged: rounding may end a fit of classes that are separated almost without a penalty.
CONVERGED_GAP = 1e-3
#: Passes over the rows for one penalty; a fit that takes more separates its classes almost without one.
MAX_PASSES = 1000
#: A quarter of the rows, at least this many, gives a start from which all rows need a third of the passes.
START_SHARE, MIN_START_ROWS = 4, 2000
#: From zero straight to a weak penalty all rows become certain on the way, where the curvature of before misleads. So
#: the penalty is lowered tenfold at a time, from about 1, the variance of a column, and each optimum need only be near.
APPROACH, APPROACH_GAP = 10, 0.5

#: C is chosen on a hundred rows a class, within these bounds, and on at least so many images of each class where they
#: fit: it is 45 fits, of a grid whose steps are coarse. C multiplies the sum of the losses, so that the best one hardly
#: moves with the number of rows.
MIN_CHOICE_ROWS, CHOICE_ROWS_PER_CLASS, MAX_CHOICE_ROWS, MIN_CLASS_IMAGES = 25_000, 100, 100_000, 10
#: Once the held-out loss has risen twice, tenfold C's are not tried: where classes overlap, they take longest by far.
PATIENCE = 2

#: Below this a mean loss is rounding.
_LEAST_LOSS = 1e-12

_WEIGHTS = slice(None, -1)  # the penalised columns of the parameters [K, D + 1]


def fit_logistic(problem: Problem) -> tuple[Affine, Chosen]:
    """Fit with `C`, or with the C of `C_GRID` of lowest mean held-out log loss.

    Log loss rather than accuracy: among 244 training rows many values of C tie in accuracy and noise breaks the tie.
    On ants and bees (ResNet-18, fold seeds 0 to 4) log loss chose C 0.1 to 1 and 0.953 of val came out right in the
    mean, accuracy chose C 1e-4 to 100 and 0.945.
    """
    with one_blas_thread():
        whitening = _whitening_of(problem)
        C, chosen, start = _choose(problem, whitening)
        affine, certificate = fit_at(problem, C, start=start, whitening=whitening)
    return affine, {"C": C, **chosen, "standardised": True, **certificate}


def fit_at(
    problem: Problem,
    C: float,
    *,
    start: Affine | None = None,
    whitening: Whitening | None = None,
    gap: float | None = None,
) -> tuple[Affine, Chosen]:
    """Fit this C from a start or, without one, from the optimum on fewer rows.

    To within a relative gap of `gap`, by default `GAP`, or `CONVERGED_GAP` where each pass reads the rows from a file:
    the passes from there to the last digits take longer than all before.
    """
    l2 = _l2(problem, C)
    descent = _Descent(problem, whitening)
    if start is not None:
        descent.begin_at(start)
    else:
        _begin(descent, problem, l2, whitening)
    reached = descent.solve(l2, gap=descent.final_gap if gap is None else gap)
    n_passes = descent.loss.n_passes
    is_converged = reached <= CONVERGED_GAP
    if not is_converged:
        logger.warning(
            "logistic with C=%g stopped after %d passes within %.1g of its optimum, before it converged",
            C,
            n_passes,
            reached,
        )
    return descent.affine(), {"passes": n_passes, "relative_gap": reached, "converged": is_converged}


def _choose(problem: Problem, whitening: Whitening | None) -> tuple[float, Chosen, Affine | None]:
    """Return C, how it was chosen, and a start: the mean of the folds' maps at that C, near the optimum on all rows.

    There is no start where C is chosen on a part of the rows: the optimum on a quarter of them is nearer.
    """
    given = problem.C
    part = _rows_to_choose_on(problem) if given is None else None
    paths: list[list[Affine]] = []

    def fit_and_keep(fold: Problem) -> Iterator[Affine]:
        paths.append([])
        for affine in fit_path(fold, whitening):
            paths[-1].append(affine)
            yield affine

    asked = problem if part is None else problem.subset(part)
    noted = {"rows": len(asked.targets), "grid": list(C_GRID)}
    C, chosen = select(
        asked, fit_and_keep, name="C", given=given, grid=C_GRID, default=DEFAULT_C, noted=noted, patience=PATIENCE
    )
    if part is not None or not paths:
        return C, chosen, None
    at_best = [path[C_GRID.index(C)] for path in paths[-chosen["folds"] :]]
    start = Affine(
        np.mean([affine.weight for affine in at_best], axis=0), np.mean([affine.bias for affine in at_best], axis=0)
    )
    return C, chosen, start


def _rows_to_choose_on(problem: Problem) -> Int64Array | None:
    """Return rows [M] drawn from each class alike, but for rare ones, in order; None where all of them are few enough.

    The order is that of a file. Components are drawn, each with all of its rows but for the last of a class: an image
    comes with its views, whose weights are shares of its own.
    """
    n_rows = len(problem.targets)
    most = min(MAX_CHOICE_ROWS, max(MIN_CHOICE_ROWS, CHOICE_ROWS_PER_CLASS * problem.n_targets))
    if n_rows <= most:
        return None
    _, component = np.unique(problem.component, return_inverse=True)
    place = derive_rng(problem.seed, "choice").permutation(int(component.max()) + 1)[component]
    by_class = np.lexsort((place, problem.targets))
    counts = np.bincount(problem.targets, minlength=problem.n_targets)
    rank = np.arange(n_rows) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row within its class
    rows_per_image = -(-n_rows // max(1, int(problem.is_scored.sum())))
    least = min(MIN_CLASS_IMAGES * rows_per_image, most // problem.n_targets)
    wanted = np.maximum(least, counts * most // n_rows)
    return np.sort(by_class[rank < np.repeat(wanted, counts)])


def _whitening_of(problem: Problem) -> Whitening | None:
    """Return that of all rows, also for a fold's: it says in which order to look, not what is found.

    None for small problems, where its eigenvalues cost more than the passes that it saves.
    """
    return Whitening(problem) if problem.n_multiplications >= MIN_SHARED else None


def fit_path(problem: Problem, whitening: Whitening | None) -> Iterator[Affine]:
    """Fit every C of the grid; each starts where the two before point, with the curvature that was seen on the way."""
    descent = _Descent(problem, whitening)
    for C in C_GRID:
        descent.solve(_l2(problem, C), gap=PATH_GAP[descent.dtype])
        yield descent.affine()
        descent.step_on()


def _l2(problem: Problem, C: float) -> float:
    """Return the penalty of the mean loss that this C stands for."""
    return (2 if problem.n_targets == 2 else 1) / (C * float(problem.row_weights.sum()))


def _begin(descent: _Descent, problem: Problem, l2: float, whitening: Whitening | None) -> None:
    """Bring a descent near its optimum: from zero to that on a part of its rows; few rows by stronger penalties."""
    n_rows = problem.blocks.shape[0]
    n_part = n_rows // START_SHARE
    if n_part < MIN_START_ROWS:
        for power in range(math.floor(-math.log(l2, APPROACH)), 0, -1):
            descent.solve(APPROACH**power * l2, gap=APPROACH_GAP)
        return
    # Sorted: rows of a file are then read in order.
    rows = np.sort(derive_rng(problem.seed, "start").permutation(n_rows)[:n_part])
    part = problem.subset(rows)
    earlier = _Descent(part, whitening, scale=descent.scale)
    _begin(earlier, part, l2, whitening)
    earlier.solve(l2, gap=START_GAP)
    descent.begin_after(earlier)


class _Descent:
    """Parameters [K, D + 1] on standardised rows, from zero or a start to the optima of one l2 after another."""

    def __init__(self, problem: Problem, whitening: Whitening | None, *, scale: Scale | None = None) -> None:
        # Small problems are cheap in float64; in large ones float32 halves the time, and sums are float64 in any case.
        is_small = problem.n_multiplications < MIN_SHARED
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if is_small else np.float32)
        self._rounding = 10 * float(np.finfo(self.dtype).eps)
        self._rows = Standardised(problem.blocks, self.dtype, scale)
        self.loss = SoftmaxLoss(self._rows, problem.targets, problem.row_weights)
        counts = np.bincount(problem.targets, problem.row_weights, problem.n_targets)
        # [K]; a part of the rows may lack a class, which then counts as one row: its intercept has no optimum.
        self._frequency = np.maximum(counts / counts.sum(), 1 / len(problem.targets))
        self._whitening = whitening
        self._parameters = np.zeros((problem.n_targets, problem.blocks.shape[1] + 1))
        self._departure = self._parameters
        self._curvature = Curvature(self._parameters.shape, self.dtype)
        self._mean_loss = math.log(problem.n_targets)
        self._l2: float | None = None

    def begin_at(self, start: Affine) -> None:
        """Go on from a map on raw embeddings."""
        self._parameters[:, :-1], self._parameters[:, -1] = self._rows.scale.unfold(start)

    def begin_after(self, earlier: _Descent) -> None:
        """Go on from where a descent on fewer of the rows stands, with the curvature that it saw."""
        self.begin_at(earlier.affine())
        self._curvature, self._l2 = earlier._curvature, earlier._l2

    @property
    def scale(self) -> Scale:
        """How its rows are standardised."""
        return self._rows.scale

    @property
    def final_gap(self) -> float:
        """The relative gap at which a head is done."""
        return GAP[self.dtype] if self._rows.is_in_memory else CONVERGED_GAP

    def affine(self) -> Affine:
        """Return where it stands, as a map on raw embeddings."""
        return self._rows.scale.fold(self._parameters[:, :-1], self._parameters[:, -1])

    def step_on(self) -> None:
        """Go as far again as from the last point of departure: along a path of C parameters move almost straight."""
        self._parameters, self._departure = 2 * self._parameters - self._departure, self._parameters

    def solve(self, l2: float, *, gap: float) -> float:
        """Go to the optimum of this penalty, to within a relative gap, or as near as rounding lets it.

        Returns a bound of (value - optimum) / value where it then stands.
        """
        if self._l2 is not None:
            self._curvature.add_penalty(l2 - self._l2, _WEIGHTS)
        self._l2 = l2

        def objective(parameters: Float64Array) -> tuple[float, Float64Array]:
            loss, gradient = self.loss(parameters)
            self._mean_loss = loss
            weight = parameters[:, :-1]
            gradient[:, :-1] += l2 * weight
            return loss + l2 / 2 * float(np.vdot(weight, weight)), gradient

        def first(gradient: Float64Array) -> Float64Array:
            # At zero the mean curvature of standardised features is about 1 / K.
            if self._whitening is None:
                return gradient / (1 / len(self._frequency) + l2)
            loss = self._mean_loss
            return self._whitening.apply(gradient, curvature=self._class_curvature(loss), mean_loss=loss, l2=l2)

        point = minimise(
            objective,
            self._parameters,
            curvature=self._curvature,
            first=first,
            is_done=lambda point: self._relative_gap(point, l2) <= gap,
            rounding=self._rounding,
            max_calls=MAX_PASSES,
        )
        self._parameters = point.x
        return self._relative_gap(point, l2)

    def _relative_gap(self, point: Point, l2: float) -> float:
        """Bound the gap: |dW|^2 / (2 l2), the duality gap for a function whose curvature is at least l2.

        The intercepts have no penalty: for them the quadratic estimate sum_k db_k^2 / (2 q_k) is added.
        """
        weight, bias = point.gradient[:, :-1], point.gradient[:, -1]
        penalty = l2 / 2 * float(np.vdot(point.x[:, :-1], point.x[:, :-1]))
        gap = float(np.vdot(weight, weight)) / (2 * l2)
        gap += float(np.sum(bias**2 / self._class_curvature(point.value - penalty))) / 2
        return gap / point.value

    def _class_curvature(self, mean_loss: float) -> Float64Array:
        """Return q [K] for the mean of p_k (1 - p_k): class k's share of the mean loss, as it is near certainty."""
        return np.asarray(self._frequency * min(1.0, max(mean_loss, _LEAST_LOSS)))
