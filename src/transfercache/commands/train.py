"""`tlc train-head`: a cache -> a linear head and its figures. The CACHE form imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.cache.reader import Cache
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.classes import check_classes
from transfercache.commands.cached_rows import labelled_table, open_cached
from transfercache.commands.head_result import HeadResult, SuspectsFile
from transfercache.commands.trial import Trial, parse_parts
from transfercache.errors import UsageError
from transfercache.files import check_writable
from transfercache.heads.fit import KNN, check_settings, fit_head, pick_solver
from transfercache.heads.linear_head import LinearHead
from transfercache.heads.select import OutOfFold
from transfercache.heads.suspects import find_suspects, write_suspects
from transfercache.metrics import Report, softmax
from transfercache.models.card import CardData, save_card
from transfercache.models.head_file import Model, save_model
from transfercache.splits import count_straddling, divide_roles
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from transfercache.commands.extract import Extraction

logger = logging.getLogger(__name__)


def train_head(
    cache: str | Path | Extraction,
    *,
    solver: str = config.SOLVER,
    C: str | float | None = None,
    class_weight: config.ClassWeight | None = None,
    optimizer: config.Optimizer | None = None,
    calibrate: bool = False,
    suspects: Path | str | None = None,
    shots: str | Sequence[int] | None = None,
    learning_curve: bool = False,
    seeds: int = config.SEEDS,
    repeats: int = config.REPEATS,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float | None = None,
    split_seed: int | None = None,
    tta: bool = False,
    seed: int = config.SEED,
    bundle: bool = False,
    out: Path | str | None = None,
) -> HeadResult:
    """Train a head on the training rows of a cache and report it, once, on its test split, else val.

    `cache` is a cache folder, the result of `extract_features`, or the DATA of a cache that exists for `backbone`
    and `weights`. `labels` (a CSV of path,label) overlays the cache's labels without touching it. The split is the
    cache's own, unless `val_fraction` or `split_seed` is given: both are config's where they are None, and draw it
    anew. All views of an image train (kNN takes view 0 alone); it is evaluated in view 0, or with `tta` by the mean of
    its views' probabilities. `C` belongs to every solver but linear, `optimizer` to linear, `class_weight` to all;
    None takes config's. Every choice is made by cross-validation on training rows, in view 0.

    `calibrate` fits a temperature to, and `suspects` writes a CSV of the labels ranked by, predictions of training
    images by heads that have not seen them. `shots` (images a class, such as "1,2,5"), `learning_curve` and `seeds`
    (from `seed` on, where above 1) train further heads, `repeats` for each size, whose accuracy on the reported split
    is part of that one report. `bundle` puts the backbone into the MODEL, its weights taken from where the extraction
    had them, or from `weights`.

    Raises CacheError, DataError (below two classes with training rows; DATA that has changed since its extraction;
    nothing to hold out or to report on), UsageError (unknown solver, a setting that it does not have, another split
    where the data gives one), WeightsError (`bundle`), ResourceError (`out` or `suspects` cannot be written).
    """
    check_settings(solver, C=C, class_weight=class_weight, optimizer=optimizer)
    files = {"--suspects": suspects is not None, "--out": out is not None}
    for flag, is_asked in {"--calibrate": calibrate, "--bundle": bundle, **files}.items():
        if is_asked and solver == KNN:
            raise UsageError(f"{flag}: {KNN} fits no head; choose another --solver")
    parts = parse_parts(shots, learning_curve=learning_curve, seeds=seeds, repeats=repeats)
    watch = Stopwatch()
    with watch.stage("load"):
        opened = open_cached(cache, backbone=backbone, weights=weights, cache_dir=cache_dir)
        table = labelled_table(opened, labels=labels, val_fraction=val_fraction, split_seed=split_seed)
    n_views = int(table.view.max(initial=0)) + 1
    if tta and n_views == 1:
        raise UsageError(f"--tta: {opened.folder} has one view an image; run its extract-features with --views first")
    fit = partial(fit_head, solver=solver, class_weight=class_weight, optimizer=optimizer)
    trial = Trial(*_divide(table, tta=tta), solver, fit)
    _warn_of_classes(table, opened)
    path = None if solver == KNN else _model_path(out, opened, solver)
    if suspects is not None:
        check_writable(Path(suspects))
    trial.check_parts(parts)
    backbone_tensors = _frozen_tensors(opened, weights) if bundle else {}
    with watch.stage("fit"):
        fitted = trial.fit_rows(trial.train, C=C, seed=seed)
    calibration = suspects_file = None
    if isinstance(fitted, LinearHead) and (calibrate or suspects is not None):
        with watch.stage("held_out"):
            held = trial.out_of_fold(fitted, seed=seed)
        if suspects is not None:
            suspects_file = _write_suspects(Path(suspects), trial.train, held)
        if calibrate:
            fitted, calibration = trial.calibrate(fitted, held)
    reported = trial.report(fitted)
    head = fitted if isinstance(fitted, LinearHead) else None
    points = {}
    if parts:
        with watch.stage("parts"):
            points = {name: trial.measure(part, C=C, seed=seed) for name, part in parts.items()}
    if head is not None and path is not None:
        model = _model(head, opened, reported, backbone_tensors)
        save_model(model, path)
        save_card(path, model, _card_data(opened, table), seconds=watch.elapsed(), tta=tta)
    return HeadResult(
        head=path,
        solver=solver,
        chosen=fitted.chosen,
        n_train=int(np.sum(trial.train.view == EVAL_VIEW)),
        views=1 if solver == KNN else n_views,
        tta=tta,
        is_bundled=bundle,
        straddling=count_straddling(table.split, table.labels, table.group),
        reported=reported,
        calibration=calibration,
        suspects=suspects_file,
        shots=points.get("shots", ()),
        learning_curve=points.get("learning_curve", ()),
        seeds=points.get("seeds", ()),
        seconds=watch.seconds(),
        linear_head=head,
        cache=opened.folder,
    )


def _divide(table: FeatureTable, *, tta: bool) -> tuple[FeatureTable, FeatureTable | None]:
    """Return the rows that train, in all views, and those that are reported, None where there are none."""
    roles = divide_roles(table.split, table.labels)
    train = table.subset(roles.is_train)
    if roles.reported is None:
        return train, None
    return train, table.subset(roles.is_reported & (tta | (table.view == EVAL_VIEW)))


def _warn_of_classes(table: FeatureTable, cache: Cache) -> None:
    images = table.view == EVAL_VIEW
    warnings = check_classes(
        labels=table.labels[images],
        split=table.split[images],
        component=table.group[images],
        class_names=table.class_names,
        where=str(cache.folder),
    )
    for warning in warnings:
        logger.warning("%s", warning)


def _model_path(out: Path | str | None, cache: Cache, solver: str) -> Path:
    """Return where the MODEL goes, which can be written; an unknown solver makes no folder."""
    pick_solver(solver)
    path = Path(out) if out is not None else Path(config.MODELS_DIR) / f"{cache.data_name}-{solver}.safetensors"
    check_writable(path)
    return path


def _frozen_tensors(cache: Cache, weights: str) -> dict[str, npt.NDArray[Any]]:
    # Torch, which nothing else here needs.
    from transfercache.models.network import frozen_tensors

    given = None if weights == config.WEIGHTS else weights
    return frozen_tensors(cache.spec, cache.provenance[-1].weights, weights=given)


def _write_suspects(path: Path, train: FeatureTable, held: OutOfFold) -> SuspectsFile:
    suspects = find_suspects(train.labels[held.rows], softmax(held.logits))
    paths = [train.paths[row] for row in held.rows.tolist()]
    write_suspects(path, suspects, paths=paths, class_names=train.class_names)
    n_images = int(np.sum(train.view == EVAL_VIEW))
    return SuspectsFile(path, len(held.rows), int(suspects.is_issue.sum()), n_images - len(held.rows))


def _card_data(cache: Cache, table: FeatureTable) -> CardData:
    is_image = table.view == EVAL_VIEW
    digests = cache.rows.digest[cache.rows.view == EVAL_VIEW]  # of each manifest row
    return CardData(cache.data_name, digests[table.row[is_image]], table.labels[is_image], table.split[is_image])


def _model(
    head: LinearHead, cache: Cache, reported: Report | None, backbone_tensors: dict[str, npt.NDArray[Any]]
) -> Model:
    return Model(
        head=head,
        canary_logits=head.logits(cache.canaries),
        weights_source=cache.provenance[-1].weights,
        reported=None if reported is None else reported.to_json(),
        bundled_tensors=backbone_tensors,
    )
