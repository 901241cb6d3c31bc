"""What holds for every solver, by name: the same rows, written differently, give the same head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from transfercache.cache.blocks import ArrayBlocks
from transfercache.heads.fit import SOLVERS, pick_solver
from transfercache.heads.problem import Problem
from transfercache.heads.softmax_loss import SoftmaxLoss
from transfercache.heads.standardise import Standardised

#: Solvers of an objective with a penalty C; `linear` is regularised by its number of epochs.
PENALISED = tuple(name for name in SOLVERS if name != "linear")

#: How far apart logits are that mean the same: scikit-learn and torch stop earlier than our own.
TOLERANCE = {"logistic": 5e-4, "ridge": 1e-4, "sklearn": 2e-3, "linear": 5e-3}

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_penalised = pytest.mark.parametrize("solver", PENALISED)


def pose(features, targets, *, weights=None, C: float | None = 0.3, component=None, n_targets=None) -> Problem:
    targets = np.asarray(targets, dtype=np.int64)
    n_rows = len(targets)
    return Problem(
        blocks=ArrayBlocks(np.ascontiguousarray(features, dtype=np.float32)),
        targets=targets,
        n_targets=n_targets or int(targets.max()) + 1,
        row_weights=np.ones(n_rows) if weights is None else np.asarray(weights, dtype=np.float64),
        is_scored=np.ones(n_rows, dtype=bool),
        component=np.arange(n_rows) if component is None else np.asarray(component, dtype=np.int64),
        C=C,
        optimizer="lbfgs",
        seed=0,
    )


def centred(logits):
    """Logits less their mean over the classes, which softmax does not see."""
    return logits - logits.mean(axis=1, keepdims=True)


def logits_of(solver, problem, features):
    return centred(pick_solver(solver)(problem)[0].logits(np.asarray(features, dtype=np.float32)))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    targets = rng.integers(3, size=120)
    return (0.8 * np.eye(5)[targets] + rng.standard_normal((120, 5)) + 2).astype(np.float32), targets


@pytest.mark.parametrize("n_classes", [2, 5])
def test_softmax_loss__gradient_equals_differences_and_loss_its_definition(n_classes):
    rng = np.random.default_rng(0)
    features, targets, weights = rng.standard_normal((40, 4)), rng.integers(n_classes, size=40), rng.uniform(0, 2, 40)
    rows = Standardised(ArrayBlocks(features.astype(np.float32)), np.float64)
    loss = SoftmaxLoss(rows, targets, weights)
    parameters = rng.standard_normal((n_classes, 5))
    value, gradient = loss(parameters)
    z = rows.read(0, 40) @ parameters[:, :-1].T + parameters[:, -1]
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    assert value == pytest.approx(-np.average(log_p[np.arange(40), targets], weights=weights), rel=1e-12)
    for place in np.ndindex(parameters.shape):
        step = np.zeros_like(parameters)
        step[place] = 1e-6
        difference = (loss(parameters + step)[0] - loss(parameters - step)[0]) / 2e-6
        assert gradient[place] == pytest.approx(difference, abs=1e-8)


def test_softmax_loss__float32_keeps_the_digits_of_certain_and_of_hopeless_rows():
    targets = np.array([0, 1, 0, 1])
    rows = Standardised(ArrayBlocks(np.array([[1.0], [-1.0], [-1.0], [1.0]], np.float32)), np.float32)
    for scale in (9.0, 30.0):  # the first two rows have a loss of exp(-18) or exp(-60), the others of 18 or 60
        weights = np.array([1.0, 1.0, 0.0, 0.0])
        certain = SoftmaxLoss(rows, targets, weights)(np.array([[scale, 0.0], [-scale, 0.0]]))
        assert certain[0] == pytest.approx(np.exp(-2 * scale), rel=1e-5)
        np.testing.assert_allclose(certain[1][0, 0], -np.exp(-2 * scale), rtol=1e-5)
        hopeless = SoftmaxLoss(rows, targets, 1 - weights)(np.array([[scale, 0.0], [-scale, 0.0]]))
        assert hopeless[0] == pytest.approx(2 * scale, rel=1e-6)
        np.testing.assert_allclose(hopeless[1][0, 0], 1, rtol=1e-6)


@every_solver
def test_solver__weight_2_is_the_row_twice(rows, solver):
    features, targets = rows
    # All rows doubled keep the standardisation, which does not weigh; then every third weighs double again.
    weights = np.where(np.arange(120) % 3 == 0, 2.0, 1.0)
    twice = np.concatenate([np.arange(120), np.arange(120)])
    split = np.concatenate([weights - 0.5, np.full(120, 0.5)])
    one = pose(features, targets, weights=weights, component=np.zeros(120))
    two = pose(features[twice], targets[twice], weights=split, component=np.zeros(240))
    np.testing.assert_allclose(
        logits_of(solver, two, features), logits_of(solver, one, features), atol=TOLERANCE[solver]
    )


@every_solver
def test_solver__permuted_rows_change_nothing(rows, solver):
    features, targets = rows
    order = np.random.default_rng(5).permutation(120)
    same = {"component": np.zeros(120)}
    permuted = logits_of(solver, pose(features[order], targets[order], **same), features)
    np.testing.assert_allclose(
        permuted, logits_of(solver, pose(features, targets, **same), features), atol=TOLERANCE[solver]
    )


@every_solver
def test_solver__permuted_classes_permute_the_logits(rows, solver):
    features, targets = rows
    order = np.array([2, 0, 1])
    permuted = logits_of(solver, pose(features, order[targets], component=np.zeros(120)), features)
    plain = logits_of(solver, pose(features, targets, component=np.zeros(120)), features)
    np.testing.assert_allclose(permuted[:, order], plain, atol=TOLERANCE[solver])


@every_penalised
def test_solver__column_twice_is_half_its_penalty(rows, solver):
    features, targets = rows
    doubled = logits_of(solver, pose(np.hstack([features, features]), targets, C=0.15), np.hstack([features, features]))
    single = logits_of(solver, pose(features, targets, C=0.3), features)
    np.testing.assert_allclose(doubled, single, atol=TOLERANCE[solver])


@every_solver
def test_solver__column_scaled_and_moved_changes_nothing(rows, solver):
    features, targets = rows
    moved = features * np.array([1, 10, 0.1, 100, 1], np.float32) + np.float32(3)
    same = {"component": np.zeros(120)}
    np.testing.assert_allclose(
        logits_of(solver, pose(moved, targets, **same), moved),
        logits_of(solver, pose(features, targets, **same), features),
        atol=TOLERANCE[solver],
    )


@pytest.mark.parametrize("solver", ["logistic", "sklearn"])
def test_solver__two_classes_equal_their_softmax_form(rows, solver):
    """A third class without rows: the softmax over three, its penalty then counting both vectors of the pair."""
    features, targets = rows[0][rows[1] < 2], rows[1][rows[1] < 2]
    pair = logits_of(solver, pose(features, targets, C=0.3), features)
    from scipy.optimize import minimize

    rows64 = Standardised(ArrayBlocks(features), np.float64)
    loss, n = SoftmaxLoss(rows64, targets, np.ones(len(targets))), len(targets)

    def objective(w):  # scikit-learn's: one vector w of the sigmoid, so that softmax has (-w, w) / 2
        both = np.stack([-w, w]) / 2
        value, gradient = loss(both)
        penalty = np.append(w[:-1], 0) / (0.3 * n)
        return value + w[:-1] @ w[:-1] / (0.6 * n), (gradient[1] - gradient[0]) / 2 + penalty

    w = minimize(objective, np.zeros(6), jac=True, options={"gtol": 1e-10}).x
    z = rows64.read(0, n) @ w[:-1] + w[-1]
    np.testing.assert_allclose(pair, np.stack([-z, z], axis=1) / 2, atol=TOLERANCE[solver])


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("solver", ["logistic", "sklearn"])
def test_solver__finds_the_optimum_that_the_data_were_built_for(solver, C):
    """Weights of (row, class) pairs are p(class | row) under a known map, moved so that they balance its penalty.

    Each of 60 rows stands once for each of 3 classes. With the weight p_k(x) + d_k(x) for class k the gradient of the
    loss at W is -C sum_i d x', which is -W for d = x (X'X)^-1 W' / C. The columns of x have mean zero, so that the
    intercepts stay; W sums to zero over the classes, so that the weights of a row still sum to one.
    """
    rng = np.random.default_rng(7)
    x = rng.standard_normal((60, 4))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    weight = 0.05 * rng.standard_normal((3, 4)) * min(1, 10 * C)
    weight -= weight.mean(axis=0)
    bias = np.array([0.2, -0.1, -0.1])
    p = np.exp(x @ weight.T + bias)
    p /= p.sum(axis=1, keepdims=True)
    balanced = p + x @ np.linalg.solve(x.T @ x, weight.T) / C
    assert balanced.min() > 0
    problem = pose(np.repeat(x, 3, axis=0), np.tile(np.arange(3), 60), weights=balanced.ravel(), C=C)
    found = pick_solver(solver)(problem)[0]
    tolerance = 1e-3 if solver == "sklearn" else 1e-4
    np.testing.assert_allclose(found.weight - found.weight.mean(axis=0), weight, atol=tolerance)
    np.testing.assert_allclose(found.bias - found.bias.mean(), bias, atol=tolerance)


def test_ridge__equals_scikit_learn_on_weighted_rows_and_its_path_each_fold_fitted_anew():
    from sklearn.linear_model import Ridge

    from transfercache.heads import ridge
    from transfercache.heads.select import make_folds

    rng = np.random.default_rng(0)
    targets, weights = rng.integers(4, size=300), rng.uniform(0.5, 2, 300)
    features = (0.7 * rng.standard_normal((4, 20))[targets] + rng.standard_normal((300, 20)) + 5).astype(np.float32)

    def fit(index, alpha):
        x, w = features[index].astype(np.float64), weights[index]
        mean = np.average(x, axis=0, weights=w)
        deviation = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
        model = Ridge(alpha=alpha).fit((x - mean) / deviation, np.eye(4)[targets[index]], sample_weight=w)
        return lambda rows: model.predict((rows - mean) / deviation)

    problem = pose(features, targets, weights=weights, C=0.1)
    affine, chosen = ridge.fit_ridge(problem)
    expected = fit(np.arange(300), 10.0)(features)
    np.testing.assert_allclose(affine.logits(features) / chosen["logit_scale"], expected, atol=1e-5)

    problem = replace(problem, C=None)
    errors = np.zeros(len(ridge.L2_GRID))
    for fold in make_folds(problem):
        for i, l2 in enumerate(ridge.L2_GRID):
            predict = fit(fold.train, l2 * weights[fold.train].sum())
            missed = ((np.eye(4)[targets[fold.held]] - predict(features[fold.held])) ** 2).sum(axis=1)
            errors[i] += missed @ weights[fold.held] / weights.sum()
    chosen = ridge.fit_ridge(problem)[1]
    np.testing.assert_allclose(chosen["mean_squared_error"], errors, rtol=1e-5)
    assert chosen["l2"] == ridge.L2_GRID[int(np.argmin(errors))]
