from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest

from transfercache.errors import UsageError
from transfercache.heads.fit import fit_head
from transfercache.heads.learning_curve import FRACTIONS, Point, draw_share, draw_shots, last_gain, measure


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_draw_shots__takes_k_images_of_each_class_from_as_many_components(make_table):
    # 30 rows of each of three classes; class 0 is ten videos of three frames.
    group = np.concatenate([np.repeat(np.arange(10), 3), np.arange(30, 90)])
    table = make_table(np.zeros((90, 2)), np.repeat(np.arange(3), 30), group=group)
    for seed in range(20):
        rows = draw_shots(table, 4, rng(seed))
        assert np.bincount(table.labels[rows]).tolist() == [4, 4, 4]
        assert len(set(table.group[rows])) == 12
    seen = {row for seed in range(200) for row in draw_shots(table, 4, rng(seed)).tolist()}
    assert seen == set(range(90))


def test_draw_shots__components_are_as_likely_whatever_their_size(make_table):
    group = [0] * 20 + [20, 21, 22, 23, 24]
    table = make_table(np.zeros((25, 2)), np.repeat([0, 1], [21, 4]), class_names=("a", "b"), group=group)
    # Class 0 has a video of twenty frames and a photograph.
    n_video = sum(draw_shots(table, 1, rng(seed))[0] < 20 for seed in range(400))
    assert 150 < n_video < 250


def test_draw_shots__takes_all_views(make_table):
    table = make_table(np.zeros((24, 2)), np.repeat([0, 1], 12), class_names=("a", "b"), views=3)
    rows = draw_shots(table, 2, rng())
    assert len(rows) == 12
    assert np.bincount(table.row[rows]).max() == 3
    assert len(set(table.row[rows])) == 4


def test_draw_shots__of_too_few_components__names_the_class(make_table):
    table = make_table(np.zeros((7, 2)), [0, 0, 0, 0, 1, 1, 1], class_names=("ant", "bee"), group=[0, 1, 2, 3, 4, 4, 6])
    assert len(draw_shots(table, 2, rng())) == 4
    with pytest.raises(UsageError, match=r"--shots 3: class 'bee' has 2 training images \(or groups\) to draw from"):
        draw_shots(table, 3, rng())


def test_draw_share__is_stratified_and_holds_the_smaller_draws(make_table):
    table = make_table(np.zeros((96, 2)), np.repeat([0, 1], [64, 32]), class_names=("a", "b"))
    draws = [draw_share(table, fraction, rng(1)) for fraction in FRACTIONS]
    assert [np.bincount(table.labels[rows]).tolist() for rows in draws] == [[4, 2], [8, 4], [16, 8], [32, 16], [64, 32]]
    for fewer, more in pairwise(draws):
        assert set(fewer) < set(more)
    assert set(draw_share(table, 0.5, rng(2))) != set(draws[3])


def test_draw_share__keeps_components_whole_and_has_every_class(make_table):
    group = np.concatenate([np.repeat(np.arange(8), 5), [40, 41]])
    table = make_table(np.zeros((42, 2)), np.repeat([0, 1], [40, 2]), class_names=("a", "b"), group=group)
    rows = draw_share(table, 0.25, rng())
    assert np.bincount(table.labels[rows]).tolist() == [10, 1]
    for component in set(group[rows]):
        assert set(np.flatnonzero(group == component)) <= set(rows)


def test_measure__answers_once_a_draw_with_seeds_that_all_sizes_share(make_table, overlapping):
    table = make_table(*overlapping)
    asked = []

    def answer(part, seed):
        asked.append((len(part), seed))
        return fit_head(part, C=1.0, seed=seed).predict(table.features[:50]) == table.labels[:50]

    points = measure(table, (2, 20), draw=draw_shots, repeats=3, seed=5, answer=answer)
    assert asked == [(6, 5), (6, 6), (6, 7), (60, 5), (60, 6), (60, 7)]
    assert [(point.size, point.n_images, point.is_right.shape) for point in points] == [
        (2, 6, (3, 50)),
        (20, 60, (3, 50)),
    ]
    assert points[0].accuracies.mean() < points[1].accuracies.mean()
    # Draws of one repeat are the same whichever sizes are asked for; those of another are others.
    (again,) = measure(table, (20,), draw=draw_shots, repeats=3, seed=5, answer=answer)
    np.testing.assert_array_equal(again.is_right, points[1].is_right)
    assert len({row.tobytes() for row in points[0].is_right}) == 3


def test_measure__what_every_fit_warns_of_is_said_once_of_the_draws(make_table, overlapping, caplog):
    table = make_table(*overlapping)

    def answer(part, seed):
        return fit_head(part, seed=seed).predict(table.features) == table.labels

    with caplog.at_level(logging.WARNING):
        measure(table, (1,), draw=draw_shots, repeats=4, seed=0, answer=answer)
        fit_head(table.subset(draw_shots(table, 1, rng())))
    (once, after) = [message for message in caplog.messages if "is not chosen by cross-validation" in message]
    assert after == "C is not chosen by cross-validation: no class has two images (or groups) to hold out"
    assert once == f"in draws of the training images, {after}"


def test_point__json_has_the_spread():
    right = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    value = Point(5, 10.0, right).to_json("shots")
    assert value == {
        "shots": 5,
        "n_train": 10.0,
        "repeats": 3,
        "mean": pytest.approx(0.75),
        "deviation": pytest.approx(0.25),
        "min": 0.5,
        "max": 1.0,
    }
    assert Point(1.0, 10.0, right[:1]).to_json("fraction")["deviation"] is None


def drawn_points(before: float, after: float, *, n_images: int) -> tuple[Point, Point]:
    """Answers of ten heads each that are right on a fixed share of the images, the same ones for every head."""
    n_right = [round(share * n_images) for share in (before, after)]
    fewer, more = (np.tile(np.arange(n_images) < n, (10, 1)) for n in n_right)
    return Point(0.5, 50.0, fewer), Point(1.0, 100.0, more)


def test_gain__by_hand():
    # Ten of 1,000 images are won: the variance over images is p(1 - p) / 999, that over draws is none.
    gain = last_gain(drawn_points(0.90, 0.91, n_images=1000))
    half = 1.959964 * np.sqrt(0.01 * 0.99 / 999) + 1 / 1000
    assert gain.value == pytest.approx(0.01)
    assert gain.interval == (pytest.approx(0.01 - half), pytest.approx(0.01 + half))
    assert gain.to_json() == {
        "n_from": 50.0,
        "n_to": 100.0,
        "gain": gain.value,
        "interval": list(gain.interval),
        "answer": "yes",
    }


@pytest.mark.parametrize(
    ("before", "after", "n_images", "answer"),
    [
        (0.8, 0.9, 1000, "yes"),
        (0.9, 0.9, 1000, "no"),
        (0.9, 0.8, 1000, "no"),
        (0.9, 0.9, 80, "unclear"),  # one image is already more than a point
        (0.8, 0.9, 20, "unclear"),
    ],
)
def test_gain__answers(before, after, n_images, answer):
    assert last_gain(drawn_points(before, after, n_images=n_images)).answer == answer


def test_gain__spread_of_the_draws_counts():
    fewer, more = drawn_points(0.8, 0.84, n_images=1000)
    assert last_gain((fewer, more)).answer == "yes"
    noisy = fewer.is_right.copy()
    noisy[::2] = np.arange(1000) < 960
    noisy[1::2] = np.arange(1000) < 640
    assert noisy.mean() == fewer.is_right.mean()
    assert last_gain((Point(0.5, 50.0, noisy), more)).answer == "unclear"


def test_gain__of_one_image__knows_nothing():
    gain = last_gain((Point(0.5, 5.0, np.zeros((3, 1), bool)), Point(1.0, 10.0, np.ones((3, 1), bool))))
    assert (gain.value, gain.interval, gain.answer) == (1.0, (-1.0, 1.0), "unclear")
