"""Limited-memory BFGS for a smooth convex function, and the curvature it has seen, which outlives one minimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Float64Array

#: x -> value and gradient at x.
Objective = Callable[[Float64Array], tuple[float, Float64Array]]

#: Pairs of step and change of gradient that are kept: on digits 10, 20 and 40 took 571, 460 and 399 passes for a path.
MEMORY = 20
#: Sufficient decrease, and the share of the slope that must be left where values differ by rounding only.
_DECREASE = 1e-4
_MAX_HALVINGS = 12
#: Of the change's square, below which the product of a step and a change is rounding.
_LEAST_CURVATURE = 1e-12


@dataclass(frozen=True, eq=False)
class Point:
    """Where a minimisation stands."""

    x: Float64Array
    value: float
    gradient: Float64Array


class Curvature:
    """An inverse Hessian, approximated from the last steps (Nocedal and Wright, Numerical Optimization, 7.2).

    Steps and changes are rows of two arrays, whose products with each other are kept, so that both loops of the method
    are matrix-vector products: half the time of vectors one by one.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._shape = (MEMORY, *shape)
        self._steps = np.zeros((MEMORY, math.prod(shape)), dtype)  # s
        self._changes = np.zeros(self._steps.shape, dtype)  # y, of the gradient; no page is touched yet
        self._products = np.zeros((MEMORY, MEMORY))  # s_i y_j, where j is not older than i
        self._order: list[int] = []  # the rows that hold a pair, from the oldest to the newest

    def learn(self, step: Float64Array, change: Float64Array) -> None:
        """Keep a pair, if it shows curvature beyond rounding."""
        product = float(np.vdot(step, change))
        if not product > _LEAST_CURVATURE * np.vdot(change, change):
            return
        is_full = len(self._order) == MEMORY
        row = self._order.pop(0) if is_full else next(i for i in range(MEMORY) if i not in self._order)
        self._order.append(row)
        self._steps[row], self._changes[row] = step.ravel(), change.ravel()
        self._products[:, row] = self._steps @ self._changes[row]
        self._products[row, row] = product

    def add_penalty(self, difference: float, penalised: slice) -> None:
        """Take account of `difference` more l2 on the columns `penalised` of x [K, D + 1]."""
        steps, changes = self._steps.reshape(self._shape), self._changes.reshape(self._shape)
        for row in self._order:
            changes[row, :, penalised] += difference * steps[row, :, penalised]
        self._products = (self._steps @ self._changes.T).astype(np.float64)
        squares = np.einsum("ij,ij->i", self._changes, self._changes)
        self._order = [row for row in self._order if self._products[row, row] > _LEAST_CURVATURE * squares[row]]

    def direction(self, gradient: Float64Array, first: Callable[[Float64Array], Float64Array]) -> Float64Array:
        """Return minus the inverse Hessian times the gradient.

        `first` multiplies by what it is before a pair is known; after that the last pair scales it.
        """
        if not self._order:
            return first(-gradient)
        products, newest = self._products, self._order[-1]
        falls = -(self._steps @ gradient.ravel().astype(self._steps.dtype))
        shares = np.zeros(MEMORY)
        for row in reversed(self._order):
            shares[row] = (falls[row] - products[row] @ shares) / products[row, row]
        q = first(-gradient - self._combine(shares, self._changes))
        change = self._changes[newest].reshape(gradient.shape)
        q *= products[newest, newest] / np.vdot(change, first(change))
        bends = self._changes @ q.ravel().astype(self._changes.dtype)
        corrections = np.zeros(MEMORY)
        for row in self._order:
            corrections[row] = shares[row] - (bends[row] + products[:, row] @ corrections) / products[row, row]
        q += self._combine(corrections, self._steps)
        return q

    def _combine(self, shares: Float64Array, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(shares.astype(rows.dtype) @ rows).reshape(self._shape[1:])


def minimise(
    objective: Objective,
    start: Float64Array,
    *,
    curvature: Curvature,
    first: Callable[[Float64Array], Float64Array],
    is_done: Callable[[Point], bool],
    rounding: float,
    max_calls: int,
) -> Point:
    """Return the first point that `is_done`, or the last before no step helps or `max_calls` are used up.

    Values that differ by less than `rounding` of themselves count as equal; the slope then decides.
    """
    calls = 1
    point = Point(start, *objective(start))
    while not is_done(point):
        direction = curvature.direction(point.gradient, first)
        slope = float(np.vdot(point.gradient, direction))
        length = 1.0
        for _ in range(_MAX_HALVINGS):
            if calls >= max_calls:
                return point
            calls += 1
            x = point.x + length * direction
            value, gradient = objective(x)
            # Enough of a fall; or, where values differ by rounding only, one of the slope (Hager and Zhang 2005, 2.3).
            has_fallen = value <= point.value + _DECREASE * length * slope
            is_level = value <= point.value + rounding * abs(point.value)
            if has_fallen or (is_level and np.vdot(gradient, direction) <= (2 * _DECREASE - 1) * slope):
                break
            # The minimum of the parabola through both values and the slope, within bounds.
            bend = value - point.value - length * slope
            length *= min(0.5, max(0.1, -0.5 * length * slope / bend)) if np.isfinite(bend) and bend > 0 else 0.1
        else:
            return point
        curvature.learn(length * direction, gradient - point.gradient)
        point = Point(x, value, gradient)
    return point
