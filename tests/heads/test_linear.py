"""`linear`: its optimizers and how many epochs it tries."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from transfercache.heads import linear
from transfercache.heads.fit import fit_head
from transfercache.heads.linear import minibatches


def test_linear__lbfgs_ends_at_the_unpenalised_optimum(make_table, overlapping, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    features, labels = overlapping
    monkeypatch.setattr(linear, "DEFAULT_EPOCHS", 100)
    # One component for all rows: nothing can be held out, so the default number of epochs is run.
    head = fit_head(make_table(features, labels, group=np.zeros(300)), solver="linear", optimizer="lbfgs")
    reference = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(head.probabilities(features), reference.predict_proba(features), atol=1e-3)


def test_linear__adamw_comes_as_close_to_log_loss_as_logistic(make_table, overlapping):
    features, labels = overlapping
    table = make_table(features, labels)
    best = {solver: min(fit_head(table, solver=solver).chosen["mean_log_loss"]) for solver in ("logistic", "linear")}
    assert best["linear"] == pytest.approx(best["logistic"], rel=0.02)


def test_linear__another_seed_is_another_order_of_rows(make_table, overlapping, caplog):
    table = make_table(*overlapping, group=np.zeros(300))
    with caplog.at_level(logging.ERROR):
        first, second = (fit_head(table, solver="linear", seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.weight, second.weight)
    np.testing.assert_allclose(first.probabilities(table.features), second.probabilities(table.features), atol=0.05)


def test_linear__epochs_stop_where_held_out_rows_get_worse(make_table):
    """More columns than rows and a third of the labels wrong: training on memorises them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=80)
    features = rng.standard_normal((80, 200))
    features[:, 0] += 3 * labels
    noisy = np.where(rng.random(80) < 0.3, 1 - labels, labels)
    head = fit_head(make_table(features, noisy, class_names=("ant", "bee")), solver="linear")
    losses = head.chosen["mean_log_loss"]
    assert head.chosen["epochs"] < len(losses) == 60
    assert losses[-1] > min(losses)


@pytest.mark.parametrize(
    ("n_rows", "batches", "epochs"),
    [(2, 1, 60), (244, 8, 60), (4_000, 125, 16), (50_000, 129, 15), (1_281_167, 2503, 3)],
)
def test_linear__steps_and_epochs_follow_the_number_of_rows(n_rows, batches, epochs):
    assert linear.n_batches(n_rows) == batches
    assert linear.max_epochs(n_rows, "adamw") == epochs
    assert linear.max_epochs(n_rows, "lbfgs") == 40


def test_linear__small_steps_run_on_one_thread_and_give_the_rest_back(make_table, overlapping, monkeypatch):
    seen = []

    def watched(rows, n_batches, rng):
        seen.append(torch.get_num_threads())
        return minibatches(rows, n_batches, rng)

    monkeypatch.setattr(linear, "minibatches", watched)
    before = torch.get_num_threads()
    fit_head(make_table(*overlapping, group=np.zeros(300)), solver="linear")
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
