from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from transfercache.heads.calibration import fit_temperature
from transfercache.heads.linear_head import UNTRAINED_BIAS
from transfercache.metrics import softmax


def drawn(temperature: float, *, n_rows: int = 40_000, n_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from the softmax of those logits over `temperature`: the answer is known."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (n_rows, n_classes)).astype(np.float32)
    targets = (softmax(logits / temperature).cumsum(axis=1) > rng.random((n_rows, 1))).argmax(axis=1)
    return logits, targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 6.0])
def test_temperature__is_the_one_the_labels_were_drawn_by(temperature):
    logits, targets = drawn(temperature)
    assert fit_temperature(logits, targets) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature__is_scipys_minimum_of_scikit_learns_log_loss(temperature):
    logits, targets = drawn(temperature, n_rows=300)
    found = minimize_scalar(
        lambda t: log_loss(targets, softmax(logits / t)), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-7}
    )
    assert fit_temperature(logits, targets) == pytest.approx(found.x, rel=1e-4)


def test_temperature__of_scaled_logits__scales():
    logits, targets = drawn(1.0, n_rows=300)
    one = fit_temperature(logits, targets)
    assert one is not None
    # Far from the start, where a full step of Newton's would leave the bracket.
    for factor in (0.2, 7.0):
        assert fit_temperature(np.float32(factor) * logits, targets) == pytest.approx(factor * one, rel=1e-5)


def test_temperature__a_class_without_training_rows_changes_nothing():
    logits, targets = drawn(2.0, n_rows=300)
    untrained = np.full((300, 1), UNTRAINED_BIAS, np.float32)
    # Far from 1 its logit over T would come within reach.
    for factor in (1, 100):
        with_it, without = np.hstack([factor * logits, untrained]), factor * logits
        assert fit_temperature(with_it, targets) == pytest.approx(fit_temperature(without, targets), rel=1e-9)


@pytest.mark.parametrize("is_right", [True, False])
def test_temperature__rows_all_right_or_all_wrong_give_none(is_right):
    # The loss falls for ever as T goes to 0, or to infinity.
    logits = np.array([[2.0, -1.0], [-3.0, 1.0], [0.5, 0.0]], np.float32)
    best = logits.argmax(axis=1)
    assert fit_temperature(logits, best if is_right else 1 - best) is None


def test_temperature__logits_that_are_all_equal_give_none():
    assert fit_temperature(np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])) is None
