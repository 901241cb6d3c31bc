"""Strategies on cached embeddings: the first run pays for the extraction, every further one for the head alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transfercache import config
from transfercache.comparison.strategy import Outcome, Setting, Source, Strategy, extracted
from transfercache.heads.fit import fit_head, pick_solver
from transfercache.heads.knn import Neighbours
from transfercache.heads.linear_head import LinearHead
from transfercache.stopwatch import Stopwatch

#: Of training rows and a seed.
Fit = Callable[..., LinearHead | Neighbours]


def run_cached(setting: Setting, seed: int, fit: Fit) -> Outcome:
    """Load, fit and predict, timed; the extraction's seconds come from its record."""
    embeddings, rows, watch = setting.embeddings(), setting.rows, Stopwatch()
    with watch.stage("load"):
        train, reported = rows.divide(embeddings.table())
    with watch.stage("fit"):
        fitted = fit(train, seed=seed)
    with watch.stage("predict"):
        probabilities = fitted.probabilities(reported.features)
    seconds = watch.seconds()
    record = embeddings.record  # reads the cache for it, which is no part of the run
    return Outcome(
        probabilities=probabilities,
        seconds=extracted(record, seconds),
        passes=int(record["images"]),
        chosen=fitted.chosen,
        extraction=record,
    )


def knn() -> Strategy:
    """Cosine k nearest neighbours."""
    return Strategy(
        name="knn",
        source=Source.EMBEDDINGS,
        run=lambda setting, seed: run_cached(setting, seed, lambda train, seed: Neighbours.of(train)),
        options=lambda setting: {"neighbours": config.KNN_NEIGHBOURS},
        is_seeded=False,
    )


def head(solver: str) -> Strategy:
    """A linear head by one of the solvers, as `train-head` fits it with its defaults."""

    def run(setting: Setting, seed: int) -> Outcome:
        pick_solver(solver)  # what it imports is no part of the time that a head takes
        return run_cached(setting, seed, partial(fit_head, solver=solver))

    options = {"C": config.C, "class_weight": config.CLASS_WEIGHT, "optimizer": config.OPTIMIZER}
    return Strategy(
        name=solver,
        source=Source.EMBEDDINGS,
        run=run,
        options=lambda setting: {**options, "views": setting.n_views},
    )
