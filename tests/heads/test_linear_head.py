from __future__ import annotations

import numpy as np
import pytest

from transfercache.errors import DataError
from transfercache.heads.linear_head import UNTRAINED_BIAS, LinearHead


@pytest.fixture
def parts(spec):
    return {
        "weight": np.array([[1, 0], [0, 2]], np.float32),
        "bias": np.array([0, -1], np.float32),
        "class_names": ("ant", "bee"),
        "spec": spec,
        "solver": "logistic",
        "n_train": 10,
    }


def test_linear_head__logits_probabilities_and_predictions(parts):
    head = LinearHead(**parts)
    x = np.array([[3, 1], [0, 1], [1, 1]], np.float32)
    assert head.dim == 2
    assert head.logits(x).dtype == np.float32
    np.testing.assert_array_equal(head.logits(x), [[3, 1], [0, 1], [1, 1]])
    np.testing.assert_allclose(head.probabilities(x)[:, 0], 1 / (1 + np.exp([-2, 1, 0])), rtol=1e-7)
    assert head.predict(x).tolist() == [0, 1, 0]
    assert head.predict(x).dtype == np.int64


def test_linear_head__temperature_flattens_probabilities_alone(parts):
    x = np.array([[3, 1]], np.float32)
    head = LinearHead(**parts, temperature=2.0)
    np.testing.assert_array_equal(head.logits(x), [[3, 1]])
    np.testing.assert_allclose(head.probabilities(x)[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 20.0, 1000.0])
def test_linear_head__a_class_without_training_has_exactly_no_probability(parts, temperature):
    bias, weight = np.array([0, UNTRAINED_BIAS], np.float32), np.array([[1, 0], [0, 0]], np.float32)
    head = LinearHead(**{**parts, "bias": bias, "weight": weight}, temperature=temperature)
    assert head.is_trained.tolist() == [True, False]
    np.testing.assert_array_equal(head.probabilities(np.array([[3, 1], [-5, 0]], np.float32)), [[1, 0], [1, 0]])


def test_linear_head__no_rows_give_no_rows(parts):
    assert LinearHead(**parts).probabilities(np.empty((0, 2), np.float32)).shape == (0, 2)


def test_linear_head__embedding_of_another_length_is_refused(parts):
    with pytest.raises(ValueError, match=r"embeddings \(1, 3\) must be \[M, 2\]"):
        LinearHead(**parts).logits(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_linear_head__embedding_that_is_not_finite_is_of_no_class(parts, value):
    x = np.array([[3, 1], [0, value]], np.float32)
    with pytest.raises(
        DataError, match=r"^embedding 1: has values that are not finite \(NaN or infinity\); leave it out"
    ):
        LinearHead(**parts).predict(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((3, 2), np.float32)}, r"weight \(3, 2\) must be \[2, D\]"),
        ({"weight": np.zeros((2, 2))}, "weight must be finite float32"),
        ({"weight": np.full((2, 2), np.nan, np.float32)}, "weight must be finite float32"),
        ({"bias": np.zeros(3, np.float32)}, r"bias \(3,\) must be \[2\]"),
        ({"bias": np.full(2, np.inf, np.float32)}, "bias must be finite float32"),
        ({"class_names": ("ant", "ant")}, "two or more different names"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"n_train": 0}, "n_train at least 1"),
    ],
)
def test_linear_head__parts_that_do_not_fit_are_refused(parts, change, message):
    with pytest.raises(ValueError, match=message):
        LinearHead(**{**parts, **change})
