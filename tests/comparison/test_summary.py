from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from transfercache.comparison.results import Seconds
from transfercache.comparison.statistics import PairedCounts, difference_interval
from transfercache.comparison.summary import Entry, LeftOut, Summary
from transfercache.metrics import wilson_interval

from .conftest import ELSEWHERE, HERE, make_result

# The targets are 0, 1, 0, 1, 0, 1.
ALL_RIGHT, ONE_WRONG, THREE_WRONG = [0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0], [1, 0, 1, 1, 0, 1]


def make_entry(label: str, *predictions: list[int], **changes: Any) -> Entry:
    results = [
        make_result(predicted, seed=seed, strategy=label, **changes) for seed, predicted in enumerate(predictions)
    ]
    return Entry(label, tuple(results), is_kept=False)


def trained(label: str, seconds: float, predicted: list[int] = ALL_RIGHT, **changes: Any) -> Entry:
    return make_entry(label, predicted, seconds=Seconds(seconds, seconds, {}), extraction=None, **changes)


def make_summary(*entries: Entry, **changes: Any) -> Summary:
    parts: dict[str, Any] = {
        "data": "photos",
        "split": "val",
        "n_train": 8,
        "n_reported": 6,
        "backbones": ("resnet18",),
        "entries": entries,
        "left_out": (),
        "unfinished": (),
        "straddling": 0,
        "warnings": (),
        "environment": {**HERE, "versions": {"python": "3.11"}},
    }
    return Summary(**{**parts, **changes})


def test_entry__several_seeds_are_averaged_and_listed() -> None:
    entry = make_entry("linear", ONE_WRONG, THREE_WRONG, ALL_RIGHT)
    reported = entry.to_json()["reported"]
    assert reported["per_seed"] == [
        {"seed": 0, "accuracy": pytest.approx(5 / 6)},
        {"seed": 1, "accuracy": pytest.approx(0.5)},
        {"seed": 2, "accuracy": 1.0},
    ]
    assert reported["accuracy"] == pytest.approx(14 / 18)
    # Wilson of the mean on six rows: the seeds answer for the same six.
    assert reported["interval"] == pytest.approx(wilson_interval(14 / 3, 6))
    assert reported["accuracy_is"] == "mean over 3 seeds; the other figures are of seed 0"
    assert reported["confusion"] == make_result(ONE_WRONG).report().confusion.tolist()


def test_entry__one_seed_is_its_report() -> None:
    entry = make_entry("knn", ONE_WRONG)
    reported = entry.to_json()["reported"]
    assert reported["accuracy_is"] == "of seed 0"
    assert reported["interval"] == pytest.approx(wilson_interval(5, 6))
    assert {key: value for key, value in reported.items() if key not in ("accuracy_is", "per_seed")} == {
        **make_result(ONE_WRONG).report().to_json(),
        "interval": reported["interval"],
    }


def test_entry__seconds_are_the_median_over_the_seeds() -> None:
    results = [make_result(ALL_RIGHT, seed=s, seconds=Seconds(10 + s, s, {})) for s in (1, 2, 9)]
    entry = Entry("linear", tuple(results), is_kept=False)
    assert (entry.first_seconds, entry.again_seconds) == (12, 2)


def test_pairs__on_the_same_rows() -> None:
    summary = make_summary(make_entry("a", ONE_WRONG), make_entry("b", THREE_WRONG), make_entry("c", ALL_RIGHT))
    assert [(pair.a, pair.b) for pair in summary.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = summary.pairs[0]
    assert first.difference == pytest.approx(2 / 6)
    assert first.interval == difference_interval(PairedCounts(2, 3, 1, 0))
    assert first.p == pytest.approx(0.625)  # 3 against 1: 2 (C(4,0) + C(4,1)) / 16


def test_pairs__other_rows_are_never_paired() -> None:
    other = make_entry("b", ONE_WRONG, row=np.arange(6))
    with pytest.raises(ValueError, match="a and b were not evaluated on the same rows"):
        _ = make_summary(make_entry("a", ONE_WRONG), other).pairs


def test_break_even__cached_against_trained_on_the_same_backbone() -> None:
    cached = make_entry("knn", ALL_RIGHT)  # 12 s of extraction, then 0.5 s
    slow, quick = trained("finetune", 90.0), trained("tutorial-frozen", 3.0)
    other = trained("finetune (resnet34)", 90.0, backbone="resnet34")
    instant = trained("instant", 0.1)
    summary = make_summary(cached, slow, quick, other, instant)
    assert summary.to_json()["break_even"] == [
        {"cached": "knn", "against": "finetune", "experiments": 1},
        {"cached": "knn", "against": "tutorial-frozen", "experiments": 5},
        {"cached": "knn", "against": "instant", "experiments": None},
    ]


def test_break_even__seconds_of_another_machine_have_no_part_in_it() -> None:
    cached, far = make_entry("knn", ALL_RIGHT), trained("finetune", 90.0, environment=ELSEWHERE)
    other_device = trained("scratch", 90.0, environment={**HERE, "device": "a graphics card"})
    # The second seed alone was run elsewhere, but the median is of both.
    mixed = replace(cached, label="linear", results=(*cached.results, make_result(ALL_RIGHT, environment=ELSEWHERE)))
    summary = make_summary(cached, mixed, far, other_device, trained("tutorial-frozen", 3.0))
    assert [(item.cached, item.against) for item in summary.break_even] == [("knn", "tutorial-frozen")]
    assert len(summary.pairs) == 10  # the answers are compared all the same


def test_to_json__one_document_without_infinities() -> None:
    left_out = LeftOut("tutorial-finetune", 204.0, "more than --max-minutes leaves")
    best = {"accuracy": 1.0, "epoch": 2}
    summary = make_summary(
        make_entry("knn", ONE_WRONG),
        trained("tutorial-frozen", 88.0, best_on_reported=best),
        left_out=(left_out,),
        unfinished=("scratch",),
        straddling=3,
        warnings=("class 'red' is rare",),
    )
    document = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert document["schema_version"] == 1
    assert [item["name"] for item in document["strategies"]] == ["knn", "tutorial-frozen"]
    assert document["strategies"][0]["seconds"] == {
        "first": 12.5,
        "again": 0.5,
        "stages": {"extract": 12.0, "fit": 0.5},
    }
    assert document["strategies"][1]["best_on_reported"] == best
    assert document["strategies"][1]["extraction"] is None
    assert document["strategies"][1]["environment"] == HERE
    assert set(document["pairs"][0]) == {"a", "b", "difference", "interval", "p"}
    assert document["left_out"] == [
        {"name": "tutorial-finetune", "estimated_seconds": 204.0, "reason": "more than --max-minutes leaves"}
    ]
    assert (document["unfinished"], document["straddling"]) == (["scratch"], 3)
    assert document["warnings"] == ["class 'red' is rare"]
