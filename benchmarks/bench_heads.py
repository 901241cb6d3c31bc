"""`logistic` against scikit-learn on the same standardised rows: one fit at equal objective, its path, and the choice.

Run: .venv/bin/python benchmarks/bench_heads.py [PHOTOGRAPHS] [--cases 244x2,4000x30,50000x100] [--repeats 3]
     [--weights random|PATH] [--real-rows 50000]
Prints JSON. Rows are made (`made`), or, where PHOTOGRAPHS are given, embeddings of crops of a hundred of these, each
encoded anew (`real`; ResNet-18, in bf16 where the processor has units for it), whose class is the photograph that they
were cut from. Of each case:

fit   seconds to the optimum at l2 1e-4 and 1e-6 a row, ours with its standardisation, and scikit-learn's at
      the largest of its tolerances 1e-4 ... 1e-9 that comes within 1e-5 of our objective (null: none does); both
      objectives are evaluated in float64. `times_faster` is the ratio, pair by pair.
path  all nine values of C against one fit, from nothing, at the largest C, both to the gap of a path.
choice  fit of a head with C chosen of nine values in five folds, against LogisticRegressionCV on the same folds, scored
      by log loss, its standardisation inside each fold (`cases` up to --choice-rows rows); scikit-learn tries all nine,
      `logistic` no larger one once the held-out loss has risen twice.
knn   5 nearest neighbours by cosine against scikit-learn's, for queries as many as a tenth of the rows.

The sides take turns, so that a drift of the machine's speed falls on both. Excluded: imports, making the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from made_photos import list_photographs, make_photos
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from turns import spread

import transfercache
from transfercache.backbones.choice import available_computes
from transfercache.cache.blocks import ArrayBlocks
from transfercache.environment import describe_environment
from transfercache.heads import logistic
from transfercache.heads.knn import knn_probabilities
from transfercache.heads.problem import Problem
from transfercache.heads.select import make_folds
from transfercache.heads.threads import MIN_SHARED, one_blas_thread
from transfercache.heads.whitening import Whitening

TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
PENALTIES = (1e-4, 1e-6)
#: Relative difference of objectives that counts as equal.
EQUAL = 1e-5
#: The classes of embedded crops.
N_PHOTOGRAPHS = 100

Rows = tuple[np.ndarray, np.ndarray]  # float32 [N, D] standardised, int64 [N]


def made(n_rows: int, n_classes: int, dim: int) -> Rows:
    """Return Gaussian classes whose means are half as far from each other as their noise is wide, in each column."""
    g = np.random.default_rng(0)
    y = g.integers(n_classes, size=n_rows)
    means = 0.5 * g.standard_normal((n_classes, dim))
    x = (means[y] + g.standard_normal((n_rows, dim))) * np.arange(1, dim + 1) ** -0.5
    return standardised(x), y


def embedded(photographs: Path, *, weights: str, n_rows: int) -> Rows:
    """Return embeddings of `n_rows` crops, and of each the number of its photograph."""
    with tempfile.TemporaryDirectory() as made:
        source, crops = Path(made) / "source", Path(made) / "crops"
        source.mkdir()
        chosen = list_photographs(photographs)[:N_PHOTOGRAPHS]
        for number, path in enumerate(chosen):
            shutil.copy(path, source / f"{number:03d}{path.suffix}")
        make_photos(crops, n_rows, source=source)
        compute = "bf16" if "bf16" in available_computes("cpu") else "fp32"
        extracted = transfercache.extract_features(
            crops, weights=weights, compute=compute, cache_dir=Path(made) / "cache"
        )
        table = extracted.table()
        y = np.array([int(Path(path).stem) % len(chosen) for path in table.paths])
        return standardised(table.features), y


def standardised(x: np.ndarray) -> np.ndarray:
    """Return float32 [N, D] with mean 0 and variance 1 by column."""
    deviation = x.std(axis=0)
    return ((x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def problem(rows: Rows, C: float | None) -> Problem:
    """Return the problem of these rows, each weighing 1."""
    x, y = rows
    n = len(y)
    is_scored = np.ones(n, dtype=bool)
    return Problem(ArrayBlocks(x), y, int(y.max()) + 1, np.ones(n), is_scored, np.arange(n), C, "adamw", 0)


def objective(rows: Rows, weight: np.ndarray, bias: np.ndarray, l2: float) -> float:
    """Return the mean loss plus l2 |W|^2 / 2, W [K, D] centred over the classes (for two classes: scikit-learn's)."""
    x, y = rows
    weight = weight - weight.mean(axis=0)
    loss = 0.0
    for start in range(0, len(y), 4096):
        z = x[start : start + 4096].astype(np.float64) @ weight.T + bias
        highest = z.max(axis=1, keepdims=True)
        z -= highest
        loss += float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), y[start : start + 4096]]).sum())
    return loss / len(y) + (2 if len(weight) == 2 else 1) * l2 / 2 * float(np.sum(weight**2))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall seconds of a call, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def fit_sklearn(rows: Rows, l2: float, tolerance: float) -> tuple[float, float]:
    """Return seconds and objective of scikit-learn's lbfgs."""
    x, y = rows
    model = LogisticRegression(C=1 / (l2 * len(y)), tol=tolerance, max_iter=10_000)
    seconds, _ = timed(lambda: model.fit(x, y))
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return seconds, objective(rows, weight, bias, l2)


def fit_ours(rows: Rows, l2: float) -> tuple[float, float, dict[str, Any]]:
    """Return seconds, objective and what the solver says of its fit."""
    seconds, (affine, chosen) = timed(lambda: logistic.fit_logistic(problem(rows, 1 / (l2 * len(rows[1])))))
    return seconds, objective(rows, affine.weight, affine.bias, l2), chosen


def compare_fits(rows: Rows, l2: float, repeats: int) -> dict[str, Any]:
    """Find scikit-learn's tolerance for our objective, then take turns at both."""
    _, ours, chosen = fit_ours(rows, l2)
    reached: dict[float, float] = {}
    for tolerance in TOLERANCES:
        reached[tolerance] = fit_sklearn(rows, l2, tolerance)[1]
        if reached[tolerance] <= ours * (1 + EQUAL):
            break
    is_reached = reached[tolerance] <= ours * (1 + EQUAL)
    pairs = [(fit_sklearn(rows, l2, tolerance)[0], fit_ours(rows, l2)[0]) for _ in range(repeats)]
    return {
        "l2": l2,
        "objective": ours,
        "sklearn_objective": reached[tolerance],
        "sklearn_tolerance": tolerance if is_reached else None,
        "passes": chosen["passes"],
        "relative_gap": chosen["relative_gap"],
        "sklearn_s": spread([theirs for theirs, _ in pairs]),
        "logistic_s": spread([mine for _, mine in pairs]),
        "times_faster": spread([theirs / mine for theirs, mine in pairs]),
    }


def whitening_of(posed: Problem) -> Whitening | None:
    """Return what the passes begin with, as `logistic` does; to make it is part of what is timed."""
    return Whitening(posed) if posed.n_multiplications >= MIN_SHARED else None


def one_fit(posed: Problem) -> None:
    """Fit the last C of the path, from nothing and as near to its optimum as the path goes."""
    gap = max(logistic.PATH_GAP.values())
    logistic.fit_at(posed, logistic.C_GRID[-1], whitening=whitening_of(posed), gap=gap)


def compare_path(rows: Rows, repeats: int) -> dict[str, Any]:
    """Time the path of nine values of C against one fit at the last, from nothing and to the same gap."""
    posed = problem(rows, None)
    times = []
    for _ in range(repeats):
        with one_blas_thread():
            path, _ = timed(lambda: list(logistic.fit_path(posed, whitening_of(posed))))
            one, _ = timed(lambda: one_fit(posed))
        times.append((path, one))
    return {
        "path_s": spread([path for path, _ in times]),
        "one_fit_s": spread([one for _, one in times]),
        "times_one_fit": spread([path / one for path, one in times]),
    }


def compare_choice(rows: Rows, repeats: int) -> dict[str, Any]:
    """Time C chosen of nine in five folds, ours and scikit-learn's, on the same folds and by the same score."""
    x, y = rows
    posed = problem(rows, None)
    folds = [(fold.train, fold.held) for fold in make_folds(posed)]
    pairs, chosen = [], {}
    for _ in range(repeats):
        model = LogisticRegressionCV(
            Cs=list(logistic.C_GRID), cv=folds, scoring="neg_log_loss", max_iter=1000, use_legacy_attributes=False
        )
        theirs, _ = timed(lambda model=model: make_pipeline(StandardScaler(), model).fit(x, y))
        mine, (_, choice) = timed(lambda: logistic.fit_logistic(posed))
        pairs.append((theirs, mine))
        chosen = {"logistic_C": choice["C"], "sklearn_C": float(np.ravel(model.C_)[0])}
    return {
        "sklearn_s": spread([theirs for theirs, _ in pairs]),
        "logistic_s": spread([mine for _, mine in pairs]),
        "share_of_sklearn": spread([mine / theirs for theirs, mine in pairs]),
        **chosen,
    }


def compare_knn(rows: Rows, repeats: int) -> dict[str, Any]:
    """Time the nearest neighbours of a tenth of the rows among all."""
    x, y = rows
    queries = x[:: max(1, 10)]
    pairs = []
    for _ in range(repeats):
        model = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        theirs, _ = timed(lambda model=model: model.fit(x, y).predict_proba(queries))
        mine, _ = timed(lambda: knn_probabilities(ArrayBlocks(x), y, queries, n_classes=int(y.max()) + 1))
        pairs.append((theirs, mine))
    return {"times_faster": spread([theirs / mine for theirs, mine in pairs]), "queries": len(queries)}


def measure(rows: Rows, *, repeats: int, with_choice: bool) -> dict[str, Any]:
    """Return all figures of one case."""
    x, y = rows
    return {
        "rows": len(y),
        "dim": x.shape[1],
        "classes": int(y.max()) + 1,
        "fit": [compare_fits(rows, l2, repeats) for l2 in PENALTIES],
        "path": compare_path(rows, repeats),
        **({"choice": compare_choice(rows, repeats)} if with_choice else {}),
        "knn": compare_knn(rows, repeats),
    }


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Measure and return what is printed."""
    warnings.simplefilter("ignore")  # scikit-learn's of convergence: the objectives say it
    measured = {}
    for case in filter(None, given.cases.split(",")):
        n_rows, n_classes = map(int, case.split("x"))
        rows = made(n_rows, n_classes, given.dim)
        measured[f"made {case}"] = measure(rows, repeats=given.repeats, with_choice=n_rows <= given.choice_rows)
    if given.photographs is not None:
        rows = embedded(given.photographs, weights=given.weights, n_rows=given.real_rows)
        measured["real"] = measure(rows, repeats=given.repeats, with_choice=given.real_rows <= given.choice_rows)
    return {"n": given.repeats, "cases": measured, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--cases", default="244x2,4000x30,50000x100")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--choice-rows", type=int, default=10_000)
    parser.add_argument("--real-rows", type=int, default=50_000)
    print(json.dumps(main(parser.parse_args()), indent=1))
