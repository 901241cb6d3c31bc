"""From labelled embeddings to a `LinearHead`, by any solver; the one place that knows them all."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np

from transfercache import config
from transfercache.arrays import Float32Array, Float64Array, Int64Array
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import DataError, UsageError, did_you_mean
from transfercache.heads.linear_head import UNTRAINED_BIAS, LinearHead
from transfercache.heads.problem import Affine, Problem, Solver

#: The solvers that fit a head; `knn` beside them fits nothing (heads/knn.py).
SOLVERS = ("logistic", "ridge", "linear", "sklearn")
KNN = "knn"
#: Which of the settings each of them has.
SETTINGS_OF = {
    **dict.fromkeys(("logistic", "ridge", "sklearn"), ("C", "class-weight")),
    "linear": ("class-weight", "optimizer"),
    KNN: (),
}


def pick_solver(name: str) -> Solver:
    """Return the solver of this name, importing what it needs only now; raises UsageError for an unknown one."""
    if name == "logistic":
        from transfercache.heads.logistic import fit_logistic

        return fit_logistic
    if name == "ridge":
        from transfercache.heads.ridge import fit_ridge

        return fit_ridge
    if name == "sklearn":
        from transfercache.heads.sklearn_logistic import fit_sklearn

        return fit_sklearn
    if name == "linear":
        from transfercache.heads.linear import fit_linear

        return fit_linear
    suggestion = did_you_mean(name, SOLVERS)
    raise UsageError(
        f"unknown solver {name!r}{suggestion}; these fit a head: {', '.join(SOLVERS)} (knn only evaluates)"
    )


def fit_head(
    table: FeatureTable,
    *,
    solver: str = config.SOLVER,
    C: str | float | None = None,
    class_weight: str | None = None,
    optimizer: str | None = None,
    seed: int = config.SEED,
) -> LinearHead:
    """Fit a head to the labelled rows of `table`, which are all taken as training rows.

    A setting that is None is config's; `C` belongs to all but `linear`, `optimizer` to `linear`. `balanced` weighs a
    row by n / (classes * rows of its class), as scikit-learn does, in the fit and in the choice alike. All views of an
    image train, and weigh together as much as the image alone, so that C means the same whatever their number; held-out
    rows are scored in view 0. A class without rows gets the probability 0. Raises UsageError for an unknown word or
    another solver's setting, DataError below two classes with rows.
    """
    fit = pick_solver(solver)
    check_settings(solver, C=C, class_weight=class_weight, optimizer=optimizer)
    class_weight = config.CLASS_WEIGHT if class_weight is None else class_weight
    optimizer = config.OPTIMIZER if optimizer is None else optimizer
    _check_word("class-weight", class_weight, get_args(config.ClassWeight))
    _check_word("optimizer", optimizer, get_args(config.Optimizer))
    penalty = _penalty(config.C if C is None else C)
    table = table.subset(table.labels >= 0)
    classes = _trainable_classes(table)
    targets = np.searchsorted(classes, table.labels).astype(np.int64)
    problem = Problem(
        blocks=table.blocks,
        targets=targets,
        n_targets=len(classes),
        # An image counts once: its weight is spread over its views.
        row_weights=_row_weights(targets, class_weight) / np.bincount(table.row)[table.row],
        is_scored=table.view == EVAL_VIEW,
        component=table.group,
        C=penalty,
        optimizer=optimizer,
        seed=seed,
    )
    fitted, chosen = fit(problem)
    weight, bias = _spread(fitted, classes, n_classes=len(table.class_names))
    return LinearHead(
        weight=weight,
        bias=bias,
        class_names=table.class_names,
        spec=table.spec,
        solver=solver,
        n_train=int(np.sum(table.view == EVAL_VIEW)),
        chosen={**chosen, "class_weight": class_weight},
    )


def check_settings(solver: str, *, C: str | float | None, class_weight: str | None, optimizer: str | None) -> None:
    """Raise UsageError where a setting is given, not None, that this solver, or `knn`, does not have."""
    given = {"C": C, "class-weight": class_weight, "optimizer": optimizer}
    for flag, value in given.items():
        if value is not None and flag not in SETTINGS_OF.get(solver, given):
            owners = ", ".join(name for name, flags in SETTINGS_OF.items() if flag in flags)
            raise UsageError(f"--{flag} belongs to --solver {owners}, and {solver} has none; leave it out")


def _check_word(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"--{flag} {value!r} is not one of {', '.join(known)}{did_you_mean(value, known)}")


def _penalty(C: str | float) -> float | None:
    """Return C as a number, or None where it is to be chosen."""
    if C == "auto":
        return None
    try:
        value = float(C) if isinstance(C, str) else C
    except ValueError:
        raise UsageError(f"--C {C!r} must be a positive number, or auto") from None
    if not 0 < value < math.inf:
        raise UsageError(f"--C {value!r} must be a positive number, or auto")
    return float(value)


def _trainable_classes(table: FeatureTable) -> Int64Array:
    classes = np.unique(table.labels)
    if len(classes) < 2:
        found = f"only {table.class_names[classes[0]]!r} has any" if len(classes) else "there are none"
        raise DataError(f"training needs labelled rows of at least two classes, and {found}; add images or --labels")
    return classes


def _row_weights(targets: Int64Array, class_weight: str) -> Float64Array:
    if class_weight == "none":
        return np.ones(len(targets))
    counts = np.bincount(targets)
    return np.asarray((len(targets) / (len(counts) * counts))[targets])


def _spread(fitted: Affine, classes: Int64Array, *, n_classes: int) -> tuple[Float32Array, Float32Array]:
    """Return weight float32 [C, D] and bias float32 [C] for all classes, the fitted ones centred over the classes."""
    weight = np.zeros((n_classes, fitted.weight.shape[1]), dtype=np.float32)
    bias = np.full(n_classes, UNTRAINED_BIAS, dtype=np.float32)
    # Softmax does not see what all logits share; taking it out is what bounds the largest one from below.
    weight[classes] = fitted.weight - fitted.weight.mean(axis=0)
    bias[classes] = fitted.bias - fitted.bias.mean()
    return weight, bias
