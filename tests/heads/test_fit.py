"""The contract that every solver keeps, by name; what is special to one is in its own test file."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from transfercache.errors import DataError, UsageError
from transfercache.heads.fit import SOLVERS, fit_head, pick_solver

#: Keyword arguments of every way to fit a head.
WAYS = [*({"solver": name} for name in SOLVERS), {"solver": "linear", "optimizer": "lbfgs"}]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


def test_ways__cover_every_solver():
    assert {way["solver"] for way in WAYS} == set(SOLVERS)


@every_way
def test_fit_head__separable_classes_of_any_scale_are_all_right(make_table, blobs, spec, way):
    features, labels = blobs
    table = make_table(features, labels)
    head = fit_head(table, **way)
    np.testing.assert_array_equal(head.predict(features), labels)
    assert head.probabilities(features)[np.arange(90), labels].min() > 0.5
    assert (head.weight.shape, head.weight.dtype, head.bias.dtype) == ((3, 6), np.float32, np.float32)
    assert (head.solver, head.n_train, head.class_names) == (way["solver"], 90, ("ant", "bee", "cat"))
    assert head.spec == spec
    assert head.chosen["standardised"] is True
    assert head.chosen["class_weight"] == "none"


@every_way
def test_fit_head__same_seed_is_bit_identical(make_table, overlapping, way):
    first, second = (fit_head(make_table(*overlapping), seed=3, **way) for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.bias, second.bias)
    assert first.chosen == second.chosen


@every_way
def test_fit_head__leaves_the_table_and_global_randomness_alone(make_table, overlapping, way):
    import torch

    table = make_table(*overlapping)
    before = table.features.copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    fit_head(table, **way)
    np.testing.assert_array_equal(table.features, before[0])
    np.testing.assert_array_equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])


@every_way
def test_fit_head__two_classes_have_a_weight_row_each(make_table, blobs, way):
    features, labels = blobs[0][:60], blobs[1][:60]
    head = fit_head(make_table(features, labels, class_names=("ant", "bee")), **way)
    assert head.weight.shape == (2, 6)
    np.testing.assert_allclose(head.weight[0], -head.weight[1], rtol=1e-6)
    np.testing.assert_array_equal(head.predict(features), labels)


@every_way
def test_fit_head__renumbered_classes_renumber_the_predictions(make_table, blobs, way):
    features, labels = blobs
    order = np.array([2, 0, 1])
    head = fit_head(make_table(features, order[labels], class_names=("bee", "cat", "ant")), **way)
    np.testing.assert_array_equal(head.predict(features), order[labels])


@every_way
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_fit_head__class_without_rows_has_probability_zero(make_table, blobs, way, missing):
    features, labels = blobs
    kept = labels != missing
    head = fit_head(make_table(features[kept], labels[kept]), **way)
    probabilities = head.probabilities(features)
    np.testing.assert_array_equal(probabilities[:, missing], 0)
    np.testing.assert_array_equal(head.weight[missing], 0)
    assert np.isfinite(head.logits(features)).all()
    np.testing.assert_array_equal(head.predict(features[kept]), labels[kept])


@every_way
def test_fit_head__unlabelled_rows_are_left_out(make_table, blobs, way):
    features, labels = blobs
    half = labels.copy()
    half[::2] = -1
    head = fit_head(make_table(features, half), **way)
    alone = fit_head(make_table(features[1::2], labels[1::2], group=np.arange(90)[1::2]), **way)
    assert head.n_train == 45
    np.testing.assert_array_equal(head.weight, alone.weight)


@every_way
def test_fit_head__constant_and_duplicated_columns_are_harmless(make_table, blobs, way):
    features, labels = blobs
    wide = np.hstack([features, np.full((90, 1), 1234.567), np.zeros((90, 1)), features[:, :1]])
    head = fit_head(make_table(wide, labels), **way)
    np.testing.assert_array_equal(head.weight[:, 6:8], 0)
    np.testing.assert_allclose(head.weight[:, 0], head.weight[:, 8], rtol=1e-3)
    np.testing.assert_array_equal(head.predict(wide.astype(np.float32)), labels)


@every_way
def test_fit_head__balanced_raises_the_recall_of_a_rare_class(make_table, way):
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [190, 10])  # 1.5 deviations apart: calling everything common is right 19 times in 20
    features = rng.standard_normal((200, 4)).astype(np.float32)
    features[labels == 1, 0] += 1.5
    table = make_table(features, labels, class_names=("common", "rare"))
    plain, balanced = (fit_head(table, class_weight=weight, **way) for weight in ("none", "balanced"))
    rare = labels == 1
    assert plain.predict(features)[rare].mean() <= 0.2
    assert balanced.predict(features)[rare].mean() >= 0.6
    assert balanced.chosen["class_weight"] == "balanced"


@every_way
def test_fit_head__single_row_classes_fall_back_and_say_so(make_table, way, caplog):
    table = make_table([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    with caplog.at_level(logging.WARNING):
        head = fit_head(table, **way)
    assert "is not chosen by cross-validation: no class has two images (or groups) to hold out" in caplog.text
    assert head.chosen["by"] == "default: no class can be held out"
    np.testing.assert_array_equal(head.predict(table.features), [0, 1])


# Not ridge: squared error gives up one row of 61 for the others.
@pytest.mark.parametrize(
    "way", [way for way in WAYS if way["solver"] != "ridge"], ids=lambda way: "-".join(way.values())
)
def test_fit_head__class_of_one_row_beside_larger_ones_is_learnt(make_table, blobs, way):
    features, labels = blobs[0][:61], blobs[1][:61]
    head = fit_head(make_table(features, labels), **way)
    np.testing.assert_array_equal(head.predict(features), labels)
    assert head.chosen["folds"] == 5


@every_way
def test_fit_head__choice_is_recorded_in_plain_json_types(make_table, overlapping, way):
    import json

    chosen = fit_head(make_table(*overlapping), seed=4, **way).chosen
    assert json.loads(json.dumps(chosen)) == chosen
    criterion = "mean_squared_error" if way["solver"] == "ridge" else "mean_log_loss"
    assert chosen["by"] == f"lowest {criterion.replace('_', ' ')} of held-out rows"
    assert (chosen["folds"], chosen["seed"]) == (5, 4)
    losses = chosen[criterion]
    assert 0 < min(losses) < np.log(3)
    best = int(np.argmin(losses))
    assert chosen.get("epochs", best + 1) == best + 1
    assert "C" not in chosen or chosen["C"] == chosen["grid"][best]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, -1], "labelled rows of at least two classes, and only 'bee' has any; add images or --labels"),
        ([-1, -1, -1], "labelled rows of at least two classes, and there are none; add images or --labels"),
    ],
)
def test_fit_head__below_two_classes_is_an_error(make_table, labels, message):
    with pytest.raises(DataError, match=message):
        fit_head(make_table(np.eye(3), labels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"solver": "logistics"},
            r"unknown solver 'logistics' \(did you mean logistic\?\); these fit a head: logistic, r",
        ),
        (
            {"solver": "knn"},
            r"unknown solver 'knn'; these fit a head: logistic, ridge, linear, sklearn \(knn only evaluates\)",
        ),
        ({"class_weight": "balance"}, r"--class-weight 'balance' is not one of none, balanced \(did you mean balanced"),
        (
            {"solver": "linear", "optimizer": "adam"},
            r"--optimizer 'adam' is not one of adamw, lbfgs \(did you mean adamw\?\)",
        ),
        ({"C": 0}, "--C 0 must be a positive number, or auto"),
        ({"C": float("nan")}, "--C nan must be a positive number, or auto"),
        ({"C": "one"}, "--C 'one' must be a positive number, or auto"),
        ({"C": "-1"}, "--C -1.0 must be a positive number, or auto"),
        ({"solver": "linear", "C": 1.0}, "--C belongs to --solver logistic"),
        (
            {"solver": "linear", "C": "auto"},
            "--C belongs to --solver logistic, ridge, sklearn, and linear has none; leave it out",
        ),
        ({"optimizer": "adamw"}, "--optimizer belongs to --solver linear, and logistic has none; leave it out"),
    ],
)
def test_fit_head__word_that_is_off_is_a_usage_error(make_table, blobs, words, message):
    with pytest.raises(UsageError, match=message):
        fit_head(make_table(*blobs), **words)


def test_pick_solver__each_imports_its_own_library_alone():
    def loaded(solver: str) -> str:
        code = f"import sys; from transfercache.heads.fit import pick_solver; pick_solver({solver!r}); "
        code += "print(*{'torch', 'sklearn'} & set(sys.modules))"
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    assert loaded("logistic") == ""
    assert loaded("ridge") == ""
    assert loaded("sklearn") == "sklearn"
    assert loaded("linear") == "torch"


def test_pick_solver__every_name_is_found():
    assert len({pick_solver(name) for name in SOLVERS}) == len(SOLVERS)


def test_fit_head__equal_views_change_nothing(make_table, overlapping):
    features, labels = overlapping
    one = fit_head(make_table(features, labels), solver="logistic", seed=2)
    table = make_table(np.repeat(features, 3, axis=0), np.repeat(labels, 3), views=3)
    three = fit_head(table, solver="logistic", seed=2)
    # The same C from the same folds and losses: a view weighs its share of the image.
    assert (three.chosen["C"], three.n_train) == (one.chosen["C"], one.n_train)
    np.testing.assert_allclose(three.chosen["mean_log_loss"], one.chosen["mean_log_loss"], rtol=1e-4)
    np.testing.assert_allclose(three.weight, one.weight, atol=2e-4)


@every_way
def test_fit_head__held_out_views_are_neither_trained_on_nor_scored(make_table, overlapping, way):
    features, labels = overlapping
    # View 1 of each image names its class outright: a fold that trained on another view of a held-out image, or scored
    # view 1, would see a loss near nothing.
    both = np.stack([features, features + 50 * np.eye(8)[labels]], axis=1).reshape(600, 8)
    head = fit_head(make_table(both, np.repeat(labels, 2), views=2), **way)
    losses = head.chosen.get("mean_log_loss") or head.chosen["mean_squared_error"]
    assert min(losses) > 0.4
