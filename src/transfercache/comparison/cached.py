"""Strategies on cached embeddings: the first run pays for the extraction, every further one for the head alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.comparison.results import Seconds
from transfercache.comparison.strategy import Outcome, Setting, Source, Strategy
from transfercache.heads.fit import fit_head, pick_solver
from transfercache.heads.knn import knn_probabilities
from transfercache.stopwatch import Stopwatch

#: Embeddings float32 [M, D] -> probabilities float64 [M, C].
Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]
#: Training rows and seed -> what predicts, and what was chosen.
Fit = Callable[[FeatureTable, int], tuple[Predict, Mapping[str, Any]]]


def fit_knn(train: FeatureTable, seed: int) -> tuple[Predict, Mapping[str, Any]]:
    """Keep the images as the eval transform shows them: more views would be each other's neighbours."""
    n_classes = len(train.class_names)
    train = train.subset(train.view == EVAL_VIEW)
    chosen = {"neighbours": config.KNN_NEIGHBOURS}
    return lambda x: knn_probabilities(train.blocks, train.labels, x, n_classes=n_classes), chosen


def _fit_solver(solver: str) -> Fit:
    def fit(train: FeatureTable, seed: int) -> tuple[Predict, Mapping[str, Any]]:
        head = fit_head(train, solver=solver, seed=seed)
        return head.probabilities, head.chosen

    return fit


def run_cached(setting: Setting, seed: int, fit: Fit) -> Outcome:
    """Load, fit and predict, timed; the extraction's seconds come from its record."""
    embeddings, rows, watch = setting.embeddings(), setting.rows, Stopwatch()
    with watch.stage("load"):
        train, reported = rows.divide(embeddings.table())
    with watch.stage("fit"):
        predict, chosen = fit(train, seed)
    with watch.stage("predict"):
        probabilities = predict(reported.features)
    stages = watch.seconds()
    again, record = stages.pop("total"), embeddings.record
    extract = float(record["seconds"])
    return Outcome(
        probabilities=probabilities,
        seconds=Seconds(first=extract + again, again=again, stages={"extract": extract, **stages}),
        passes=int(record["images"]),
        chosen=chosen,
        extraction=record,
    )


def knn() -> Strategy:
    """Cosine k nearest neighbours."""
    return Strategy(
        name="knn",
        source=Source.EMBEDDINGS,
        run=lambda setting, seed: run_cached(setting, seed, fit_knn),
        options=lambda setting: {"neighbours": config.KNN_NEIGHBOURS},
        is_seeded=False,
    )


def head(solver: str) -> Strategy:
    """A linear head by one of the solvers, as `train-head` fits it with its defaults."""

    def run(setting: Setting, seed: int) -> Outcome:
        pick_solver(solver)  # what it imports is no part of the time that a head takes
        return run_cached(setting, seed, _fit_solver(solver))

    options = {"C": config.C, "class_weight": config.CLASS_WEIGHT, "optimizer": config.OPTIMIZER}
    return Strategy(
        name=solver,
        source=Source.EMBEDDINGS,
        run=run,
        options=lambda setting: {**options, "views": setting.n_views},
    )
