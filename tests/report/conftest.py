"""A finished comparison on six rows, made by hand; the targets are 0, 1, 0, 1, 0, 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from transfercache.comparison.results import RunResult, Seconds
from transfercache.comparison.summary import Entry, Summary

HERE = {"device": "a processor", "machine": {"cores": 2, "vector_units": "AVX2"}}
RUN = {
    "seconds": 17.0,
    "images": 14,
    "device": "an older processor",
    "machine": {"cores": 2, "vector_units": "none known"},
    "date": "2026-11-01T10:00:00+00:00",
}
RECORD = {**RUN, "is_complete": True, "is_from_this_run": False, "runs": [RUN]}


def make_entry(label: str, right: list[int], *, is_kept: bool = False, **changes: Any) -> Entry:
    """One result a seed; `right` says for each how many of the six rows, counted from the first, are right."""
    return Entry(
        label, tuple(_make_result(label, n, seed=seed, **changes) for seed, n in enumerate(right)), is_kept=is_kept
    )


def _make_result(label: str, n_right: int, *, seed: int, **changes: Any) -> RunResult:
    target = np.arange(6) % 2
    predicted = np.where(np.arange(6) < n_right, target, 1 - target)
    parts: dict[str, Any] = {
        "strategy": label,
        "backbone": "resnet18",
        "seed": seed,
        "split": "val",
        "class_names": ("blue", "red"),
        "n_train_per_class": np.array([600, 634]),
        "row": np.arange(6),
        "target": target,
        "probabilities": np.eye(2)[predicted],
        "seconds": Seconds(17.25, 0.25, {"extract": 17.0, "fit": 0.25}),
        "backbone_passes": 1240,
        "chosen": {},
        "best_on_reported": None,
        "extraction": RECORD,
        "environment": HERE,
        "date": "2026-11-25T09:00:00+00:00",
        "tlc_version": "0.1.0",
    }
    return RunResult(**{**parts, **changes})


def make_summary(*entries: Entry, **changes: Any) -> Summary:
    parts: dict[str, Any] = {
        "data": "photos",
        "split": "val",
        "n_train": 1234,
        "n_reported": 6,
        "backbones": ("resnet18",),
        "entries": entries,
        "left_out": (),
        "unfinished": (),
        "straddling": 0,
        "warnings": (),
        "environment": {**HERE, "versions": {"python": "3.11.7", "torch": "2.15.0"}},
    }
    return Summary(**{**parts, **changes})
