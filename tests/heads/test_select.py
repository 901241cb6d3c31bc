from __future__ import annotations

import logging

import numpy as np

from transfercache.cache.blocks import ArrayBlocks
from transfercache.heads.problem import Affine, Problem
from transfercache.heads.select import make_folds, mean_held_out_losses, row_losses, select


def make_problem(targets, component=None, *, weights=None, features=None) -> Problem:
    targets = np.asarray(targets, dtype=np.int64)
    n_rows = len(targets)
    return Problem(
        blocks=ArrayBlocks(np.zeros((n_rows, 2), np.float32) if features is None else features),
        targets=targets,
        n_targets=int(targets.max()) + 1,
        row_weights=np.ones(n_rows) if weights is None else weights,
        is_scored=np.ones(n_rows, dtype=bool),
        component=np.arange(n_rows) if component is None else np.asarray(component, dtype=np.int64),
        C=None,
        optimizer="adamw",
        seed=0,
    )


def test_make_folds__hold_each_row_out_once_and_divide_no_component():
    component = np.repeat(np.arange(20), 3)
    problem = make_problem(np.repeat(np.arange(20) % 2, 3), component)
    folds = make_folds(problem)
    assert len(folds) == 5
    np.testing.assert_array_equal(np.sort(np.concatenate([fold.held for fold in folds])), np.arange(60))
    for fold in folds:
        assert not set(component[fold.train]) & set(component[fold.held])
        assert np.bincount(problem.targets[fold.held]).tolist() == [6, 6]


def test_make_folds__shrink_to_the_components_there_are():
    assert len(make_folds(make_problem([0, 0, 0, 1, 1]))) == 3
    assert make_folds(make_problem([0, 1, 2])) == []
    assert make_folds(make_problem([0, 0, 1, 1], component=[0, 0, 2, 2])) == []


def test_make_folds__single_row_class_always_trains():
    for fold in make_folds(make_problem([0, 0, 0, 1])):
        assert 3 in fold.train


def test_make_folds__fold_whose_training_rows_lack_a_class_is_left_out():
    # Class 1 lives only inside a component that class 0 outnumbers: holding that out would leave none to learn from.
    problem = make_problem([0, 0, 0, 0, 1], component=[0, 1, 2, 2, 2])
    folds = make_folds(problem)
    assert len(folds) == 2
    assert all(4 in fold.train for fold in folds)


def test_select__takes_the_lowest_weighted_mean_and_the_first_of_ties():
    problem = make_problem([0, 0, 1, 1], weights=np.array([1.0, 1.0, 3.0, 3.0]))
    biases = [np.array([0.0, 0.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 9.0])]
    setting, chosen = select(
        problem,
        lambda fold: (Affine(np.zeros((2, 2)), bias) for bias in biases),
        name="bias",
        grid="abcd",
        default="e",
        noted={"grid": "a to d"},
    )
    expected = [(2 * np.log1p(np.exp(z)) + 6 * np.log1p(np.exp(-z))) / 8 for z in (0, 1, 1, 9)]
    assert list(chosen) == ["by", "folds", "seed", "mean_log_loss", "grid"]
    np.testing.assert_allclose(chosen["mean_log_loss"], expected, rtol=1e-12)
    assert (setting, chosen["folds"]) == ("b", 2)


def _of_biases(biases_of_fold):
    """A path of maps that are nothing but a bias for class 1, in each fold its own; and how many were fitted."""
    n_fitted = []

    def fit_path(fold):
        biases = biases_of_fold[len(n_fitted) % len(biases_of_fold)]
        n_fitted.append(0)
        for bias in biases:
            n_fitted[-1] += 1
            yield Affine(np.zeros((2, 2)), np.array([0.0, bias]))

    return fit_path, n_fitted


def test_select__with_patience__ends_where_the_loss_has_risen_so_many_times_in_a_row():
    problem = make_problem([0, 1] * 5)
    biases = [3.0, 1.0, 2.0, 0.0, 1.0, 2.0, 9.0, 0.0]  # the loss rises once, falls, rises twice
    fit_path, n_fitted = _of_biases([biases])
    setting, chosen = select(problem, fit_path, name="x", grid="abcdefgh", default="z", patience=2)
    assert (setting, chosen["not_tried"], n_fitted) == ("d", ["g", "h"], [6] * 5)
    expected = [(np.log1p(np.exp(z)) + np.log1p(np.exp(-z))) / 2 for z in biases[:6]]
    np.testing.assert_allclose(chosen["mean_log_loss"], expected, rtol=1e-12)
    fit_path, n_fitted = _of_biases([biases])
    setting, chosen = select(problem, fit_path, name="x", grid="abcdefgh", default="z", patience=3)
    assert (setting, chosen["not_tried"], n_fitted) == ("d", ["h"], [7] * 5)
    fit_path, n_fitted = _of_biases([biases])
    setting, chosen = select(problem, fit_path, name="x", grid="abcdefgh", default="z")
    assert (setting, "not_tried" in chosen, n_fitted) == ("d", False, [8] * 5)


def test_select__with_patience__tries_all_where_the_first_fold_ended_before_the_others_had_their_lowest():
    problem = make_problem([0, 1] * 5)
    fit_path, n_fitted = _of_biases([[0.0, 1.0, 2.0, 3.0, 4.0]] + [[9.0, 8.0, 7.0, 0.0, 1.0]] * 4)
    setting, chosen = select(problem, fit_path, name="x", grid="abcde", default="z", patience=2)
    assert (setting, len(chosen["mean_log_loss"]), "not_tried" in chosen) == ("d", 5, False)
    assert n_fitted == [3] * 5 + [5] * 5


def test_select__shows_each_fit_only_its_training_rows():
    seen = []
    features = np.arange(20, dtype=np.float32).reshape(10, 2)
    problem = make_problem(np.arange(10) % 2, features=features)
    folds = make_folds(problem)

    def fit_path(train):
        seen.append(train.blocks.read(0, 8)[:, 0] / 2)
        yield Affine(np.zeros((2, 2)), np.zeros(2))

    mean_held_out_losses(problem, folds, fit_path)
    for rows, fold in zip(seen, folds, strict=True):
        np.testing.assert_array_equal(rows, fold.train)


def test_select__nothing_to_hold_out_is_a_named_warning(caplog):
    with caplog.at_level(logging.WARNING):
        found = select(make_problem([0, 1]), lambda fold: iter(()), name="C", grid=(1.0, 2.0), default=3.0)
    assert found == (3.0, {"by": "default: no class can be held out"})
    assert caplog.messages == ["C is not chosen by cross-validation: no class has two images (or groups) to hold out"]


def test_select__what_is_given_needs_no_fold():
    found = select(make_problem([0, 1]), lambda fold: iter(()), name="C", grid=(1.0,), default=3.0, given=7.0)
    assert found == (7.0, {"by": "given"})


def test_row_losses__do_not_overflow():
    losses = row_losses(np.array([[1000.0, 0.0], [1000.0, 0.0], [0.0, 0.0]]), np.array([0, 1, 0]))
    np.testing.assert_allclose(losses, [0, 1000, np.log(2)])
