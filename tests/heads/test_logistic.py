"""`logistic` against scikit-learn's own pipeline."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transfercache.cache.blocks import ArrayBlocks
from transfercache.heads import logistic
from transfercache.heads.fit import fit_head
from transfercache.heads.problem import Problem


@pytest.mark.parametrize("solver", ["logistic", "sklearn"])
@pytest.mark.parametrize("class_weight", ["none", "balanced"])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_logistic__equals_the_pipeline(make_table, overlapping, n_classes, class_weight, C, solver):
    features, labels = (array[overlapping[1] < n_classes] for array in overlapping)
    features = features * np.float32(7) + np.float32(3)
    labels = np.where(np.arange(len(labels)) % 3 == 0, labels, 0)  # unequal class sizes
    table = make_table(features, labels, class_names=("ant", "bee", "cat")[:n_classes])
    head = fit_head(table, solver=solver, C=C, class_weight=class_weight)
    weight = {"none": None}.get(class_weight, class_weight)
    model = LogisticRegression(C=C, max_iter=1000, tol=1e-8 if solver == "logistic" else 1e-4, class_weight=weight)
    pipeline = make_pipeline(StandardScaler(), model).fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(head.probabilities(features), pipeline.predict_proba(features), atol=1e-4)
    assert head.chosen["C"] == C
    assert head.chosen["by"] == "given"
    assert head.chosen["converged"] is True
    if solver == "sklearn":
        assert head.chosen["iterations"] == model.n_iter_[0]


def test_logistic__chosen_c_equals_a_search_written_out(make_table, overlapping):
    from transfercache.splits import assign_folds

    features, labels = overlapping
    folds, _ = assign_folds(labels, np.arange(300), n_folds=5, seed=2)
    losses = []
    for C in logistic.C_GRID:
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000, tol=1e-8))
        given = np.empty(300)
        for fold in range(5):
            held = folds == fold
            pipeline.fit(features[~held].astype(np.float64), labels[~held])
            given[held] = pipeline.predict_proba(features[held])[np.arange(held.sum()), labels[held]]
        losses.append(-np.log(given).mean())
    chosen = fit_head(make_table(features, labels), seed=2).chosen
    # A path stops within 1e-4 of each optimum.
    np.testing.assert_allclose(chosen["mean_log_loss"], losses, rtol=1e-3)
    assert chosen["C"] == logistic.C_GRID[int(np.argmin(losses))]


def test_logistic__of_classes_that_overlap__does_not_try_the_largest_c(make_table):
    rng = np.random.default_rng(3)
    labels = rng.integers(3, size=240)
    features = (rng.standard_normal((240, 20)) + 0.3 * np.eye(3, 20)[labels]).astype(np.float32)
    chosen = fit_head(make_table(features, labels)).chosen
    losses, tried = chosen["mean_log_loss"], len(chosen["mean_log_loss"])
    assert tried < len(logistic.C_GRID)
    assert chosen["not_tried"] == list(logistic.C_GRID[tried:])
    assert chosen["C"] == logistic.C_GRID[int(np.argmin(losses))]
    whole = fit_head(make_table(features, labels), solver="sklearn").chosen  # tries all
    assert (whole["C"], len(whole["mean_log_loss"])) == (chosen["C"], len(logistic.C_GRID))
    # The start of the final fit is the mean of the folds' maps at that C.
    alone = fit_head(make_table(features, labels), C=chosen["C"])
    np.testing.assert_allclose(alone.weight, fit_head(make_table(features, labels)).weight, rtol=1e-3, atol=1e-6)


def test_logistic__of_many_rows__chooses_c_on_a_part_of_each_class(make_table, overlapping, monkeypatch):
    features, labels = overlapping
    labels = np.where(np.arange(300) % 10 == 0, labels, np.minimum(labels, 1))  # of the last class a tenth
    whole = fit_head(make_table(features, labels), seed=1)
    assert whole.chosen["rows"] == 300
    monkeypatch.setattr(logistic, "MAX_CHOICE_ROWS", 90)
    head = fit_head(make_table(features, labels), seed=1)
    counts = np.bincount(labels)
    assert head.chosen["rows"] == sum(min(count, max(10, count * 90 // 300)) for count in counts)
    with monkeypatch.context() as patch:  # too few for ten of each
        patch.setattr(logistic, "MAX_CHOICE_ROWS", 24)
        assert fit_head(make_table(features, labels), seed=1).chosen["rows"] == sum(
            max(8, c * 24 // 300) for c in counts
        )
    assert head.chosen["C"] == logistic.C_GRID[int(np.argmin(head.chosen["mean_log_loss"]))]
    # The head itself is of all rows.
    alone = fit_head(make_table(features, labels), C=head.chosen["C"], seed=1)
    np.testing.assert_allclose(head.weight, alone.weight, rtol=1e-4, atol=1e-7)
    assert head.n_train == 300


def test_logistic__of_many_rows__chooses_c_on_images_with_all_their_views(monkeypatch):
    image = np.repeat(np.arange(60), 3)
    problem = Problem(
        ArrayBlocks(np.zeros((180, 2), np.float32)),
        targets=image % 2,
        n_targets=2,
        row_weights=np.full(180, 1 / 3),
        is_scored=np.arange(180) % 3 == 0,
        component=image,
        C=None,
        optimizer="adamw",
        seed=0,
    )
    monkeypatch.setattr(logistic, "MAX_CHOICE_ROWS", 90)
    rows = logistic._rows_to_choose_on(problem)
    assert np.all(np.diff(rows) > 0)
    assert set(np.bincount(image[rows], minlength=60)) == {0, 3}
    assert np.bincount(problem.targets[rows]).tolist() == [45, 45]


def test_logistic__permuted_rows_give_the_same_head(make_table, overlapping):
    features, labels = overlapping
    order = np.random.default_rng(5).permutation(300)
    head = fit_head(make_table(features, labels))
    permuted = fit_head(make_table(features[order], labels[order], group=order))
    assert permuted.chosen["C"] == head.chosen["C"]
    np.testing.assert_allclose(permuted.probabilities(features), head.probabilities(features), atol=1e-4)


def test_logistic__every_row_twice_is_twice_the_c(make_table, overlapping):
    features, labels = overlapping
    twice = fit_head(make_table(np.tile(features, (2, 1)), np.tile(labels, 2), group=np.tile(np.arange(300), 2)), C=0.1)
    once = fit_head(make_table(features, labels), C=0.2)
    np.testing.assert_allclose(twice.probabilities(features), once.probabilities(features), atol=1e-4)


def test_logistic__duplicates_in_one_group_do_not_make_a_weak_penalty_look_good(make_table):
    """Labels are noise, so the strongest penalty is right; four copies of each row make memorising look right."""
    rng = np.random.default_rng(0)
    features, labels = np.tile(rng.standard_normal((40, 100)), (4, 1)), np.tile(np.arange(40) % 2, 4)
    names = ("heads", "tails")
    grouped = fit_head(make_table(features, labels, class_names=names, group=np.tile(np.arange(40), 4)))
    leaking = fit_head(make_table(features, labels, class_names=names))
    assert grouped.chosen["C"] <= 1e-2
    assert leaking.chosen["C"] >= 1e2


def test_logistic__tie_goes_to_the_stronger_penalty(make_table):
    features = np.zeros((20, 3))  # nothing to learn from: every C gives one half
    chosen = fit_head(make_table(features, np.arange(20) % 2)).chosen
    assert chosen["C"] == 1e-4


def test_logistic__fit_that_did_not_converge_is_a_named_warning(make_table, overlapping, monkeypatch, caplog):
    monkeypatch.setattr(logistic, "MAX_PASSES", 2)
    with caplog.at_level(logging.WARNING):
        head = fit_head(make_table(*overlapping), C=10.0)
    gap, n_passes = head.chosen["relative_gap"], head.chosen["passes"]
    assert gap > 1e-3
    assert 2 < n_passes <= 2 * 4  # two for this C and two for each stronger penalty on the way
    assert caplog.messages == [
        f"logistic with C=10 stopped after {n_passes} passes within {gap:.1g} of its optimum, before it converged"
    ]
    assert head.chosen["converged"] is False


def test_logistic__gap_bounds_the_distance_to_the_optimum(make_table, overlapping, monkeypatch):
    """Against the optimum that scikit-learn finds, over fits that were stopped at ever smaller gaps."""
    features, labels = overlapping
    x = StandardScaler().fit_transform(features.astype(np.float64))

    def objective(weight, bias):  # of standardised features, per row
        z = x @ weight.T + bias
        loss = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels])
        return loss + np.sum((weight - weight.mean(axis=0)) ** 2) / (2 * 0.1 * len(z))

    model = LogisticRegression(C=0.1, tol=1e-12, max_iter=10_000).fit(x, labels)
    optimum = objective(model.coef_, model.intercept_)
    gaps = []
    for gap in (0.3, 1e-2, 1e-4, 1e-6):
        monkeypatch.setitem(logistic.GAP, np.dtype(np.float64), gap)
        head = fit_head(make_table(features, labels), C=0.1)
        weight = head.weight.astype(np.float64) * features.std(axis=0, dtype=np.float64)
        bias = head.bias + head.weight.astype(np.float64) @ features.mean(axis=0, dtype=np.float64)
        value = objective(weight, bias)
        assert -1e-9 <= value - optimum <= 1.01 * head.chosen["relative_gap"] * value + 1e-9
        gaps.append(value / optimum - 1)
    assert gaps[0] > 1e-3
    assert gaps[-1] < 1e-6


def test_logistic__start_on_fewer_rows_leads_to_the_same_optimum(make_table, monkeypatch):
    rng = np.random.default_rng(2)
    labels = rng.integers(3, size=2000)
    features = (0.5 * np.eye(30)[labels] + rng.standard_normal((2000, 30))) @ rng.standard_normal((30, 30))
    cold = fit_head(make_table(features, labels), C=0.1)
    monkeypatch.setattr(logistic, "MIN_START_ROWS", 100)
    warm = fit_head(make_table(features, labels), C=0.1)
    assert warm.chosen["passes"] < cold.chosen["passes"]
    np.testing.assert_allclose(warm.probabilities(features), cold.probabilities(features), atol=1e-4)


def test_logistic__class_that_the_rows_of_a_start_lack_does_not_hold_it_up(make_table, monkeypatch):
    rng = np.random.default_rng(2)
    labels = np.append(rng.integers(2, size=1999), 2)
    features = 0.5 * np.eye(30)[labels] + rng.standard_normal((2000, 30))
    cold = fit_head(make_table(features, labels), C=0.1)
    n_passes = []
    solve = logistic._Descent.solve

    def counted(self, l2, *, gap):
        reached = solve(self, l2, gap=gap)
        n_passes.append(self.loss.n_passes)
        return reached

    monkeypatch.setattr(logistic._Descent, "solve", counted)
    monkeypatch.setattr(logistic, "MIN_START_ROWS", 100)
    warm = fit_head(make_table(features, labels), C=0.1)
    assert len(n_passes) == 5  # two stronger penalties and this one on 125 rows, then on 500 and on all
    assert max(n_passes) < 100
    np.testing.assert_allclose(warm.probabilities(features), cold.probabilities(features), atol=1e-4)
