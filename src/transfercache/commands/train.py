"""`tlc train-head`: a cache -> a linear head and its figures. The CACHE form imports no torch."""

from __future__ import annotations

import itertools
import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.cache.reader import Cache, is_cache, open_cache
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.classes import check_classes
from transfercache.commands.inputs import BadImage, cache_root, changed_words
from transfercache.errors import DataError, UsageError
from transfercache.files import check_writable
from transfercache.heads.fit import KNN, check_settings, fit_head, pick_solver
from transfercache.heads.knn import knn_probabilities
from transfercache.heads.linear_head import LinearHead
from transfercache.metrics import Report, evaluate
from transfercache.models.head_file import Model, save_model
from transfercache.overlay import overlay
from transfercache.splits import Split, complete_split, count_straddling, reported_split
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from transfercache.commands.extract import Extraction
    from transfercache.images.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HeadResult:
    """A trained head, where it was written, and its figures on the reported split (None: no labelled row there)."""

    head: Path | None  # None for knn, which only evaluates
    solver: str
    chosen: dict[str, Any]
    n_train: int  # images
    views: int  # rows of each of them
    tta: bool  # reported by the mean of an image's views
    straddling: int  # groups, or sets of equal images, that the given split divides
    reported: Report | None
    seconds: dict[str, float]  # load, fit, total
    linear_head: LinearHead | None
    cache: Path
    bad: tuple[BadImage, ...] = ()  # no image is read

    def predict(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return int64 [M], indices into the class names, for embeddings float32 [M, D]."""
        if self.linear_head is None:
            raise UsageError(f"{self.solver} only evaluates and leaves no head; train one with solver='logistic'")
        return self.linear_head.predict(features)

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        if self.head is None:
            return ("tlc", "train-head", str(self.cache), "--solver", config.SOLVER)
        return ("tlc", "predict", str(self.head), str(self.cache))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc train-head`."""
        return {
            "head": None if self.head is None else str(self.head),
            "solver": self.solver,
            "chosen": self.chosen,
            "n_train": self.n_train,
            "views": self.views,
            "tta": self.tta,
            "straddling": self.straddling,
            "reported": None if self.reported is None else self.reported.to_json(),
            "seconds": self.seconds,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.classes import render_report

        views = f" in {self.views} views" if self.views > 1 else ""
        title = f"{self.solver} on {self.n_train} training images{views}"
        written = "" if self.head is None else f"{self.head}\n"
        tta = "reported by the mean of each image's views\n" if self.tta else ""
        footer = f"{written}{tta}load {self.seconds['load']:.2f} s, fit {self.seconds['fit']:.2f} s"
        return render_report(self.reported, title=title, footer=footer)


def train_head(
    cache: str | Path | Extraction,
    *,
    solver: str = config.SOLVER,
    C: str | float | None = None,
    class_weight: config.ClassWeight | None = None,
    optimizer: config.Optimizer | None = None,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float | None = None,
    split_seed: int | None = None,
    tta: bool = False,
    seed: int = config.SEED,
    out: Path | str | None = None,
) -> HeadResult:
    """Train a head on the training rows of a cache and report it, once, on its test split, else val.

    `cache` is a cache folder, the result of `extract_features`, or the DATA of a cache that exists for `backbone`
    and `weights`. `labels` (a CSV of path,label) overlays the cache's labels without touching it. The split is the
    cache's own, unless `val_fraction` or `split_seed` is given: both are config's where they are None, and draw it
    anew. All views of an image train (kNN takes view 0 alone); it is evaluated in view 0, or with `tta` by the mean of
    its views' probabilities. `C` belongs to the solver logistic, `optimizer` to linear, `class_weight` to both; None
    takes config's. Every choice is made by cross-validation on training rows, in view 0.

    Raises CacheError, DataError (below two classes with training rows; DATA that has changed since its extraction),
    UsageError (unknown solver, a setting that it does not have, another split where the data gives one), ResourceError
    (`out` cannot be written).
    """
    check_settings(solver, C=C, class_weight=class_weight, optimizer=optimizer)
    watch = Stopwatch()
    with watch.stage("load"):
        opened = _open(cache, backbone=backbone, weights=weights, cache_dir=cache_dir)
        table = labelled_table(opened, labels=labels, val_fraction=val_fraction, split_seed=split_seed)
    train = table.subset((table.split == Split.TRAIN) & (table.labels >= 0))
    n_views = int(table.view.max(initial=0)) + 1
    if tta and n_views == 1:
        raise UsageError(f"--tta: {opened.folder} has one view an image; run its extract-features with --views first")
    if solver == KNN:  # further views would be each other's neighbours
        train = train.subset(train.view == EVAL_VIEW)
    held_out = _reported_rows(table, tta=tta)
    images = table.view == EVAL_VIEW
    warnings = check_classes(
        labels=table.labels[images],
        split=table.split[images],
        component=table.group[images],
        class_names=table.class_names,
        where=str(opened.folder),
    )
    for warning in warnings:
        logger.warning("%s", warning)
    path = None
    if solver != KNN:
        pick_solver(solver)  # an unknown one makes no folder
        path = Path(out) if out is not None else Path(config.MODELS_DIR) / f"{opened.data_name}-{solver}.safetensors"
        check_writable(path)
    with watch.stage("fit"):
        head = None
        if path is not None:
            head = fit_head(train, solver=solver, C=C, class_weight=class_weight, optimizer=optimizer, seed=seed)
    reported = None if held_out is None else _report(head, train, held_out)
    if head is not None and path is not None:
        save_model(_model(head, opened, reported), path)
    return HeadResult(
        head=path,
        solver=solver,
        chosen={"neighbours": config.KNN_NEIGHBOURS} if head is None else head.chosen,
        n_train=int(np.sum(train.view == EVAL_VIEW)),
        views=1 if solver == KNN else n_views,
        tta=tta,
        straddling=count_straddling(table.split, table.group),
        reported=reported,
        seconds=watch.seconds(),
        linear_head=head,
        cache=opened.folder,
    )


def labelled_table(
    cache: Cache, *, labels: Path | str | None, val_fraction: float | None, split_seed: int | None
) -> FeatureTable:
    """Return the good rows of a cache with a label file laid over, and their split.

    Where `val_fraction` or `split_seed` is given, the split is drawn anew, as extraction draws it. Rows that only the
    file labels are then split among themselves; where the data gives its split, they are in none.
    """
    table = cache.table()
    is_redrawn = val_fraction is not None or split_seed is not None
    if is_redrawn and cache.catalogue.has_given_split:
        flag = "--split-seed" if val_fraction is None else "--val-fraction"
        raise UsageError(f"{flag}: the data of {cache.folder} gives its own split, which stays; leave the flag out")
    if labels is None and not is_redrawn:
        return table
    # Over all rows: the file may name bad images too, and the split is then the one that extraction draws.
    rows = cache.rows
    first = np.flatnonzero(rows.view == 0)
    content = rows.digest[first]

    def completed(split: npt.NDArray[np.uint8], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return complete_split(
            split,
            np.where(content.any(axis=1), codes, -1),
            rows.group[first],
            content,
            val_fraction=config.VAL_FRACTION if val_fraction is None else val_fraction,
            seed=config.SPLIT_SEED if split_seed is None else split_seed,
        )

    codes, class_names, split = rows.label[first], cache.class_names, rows.split[first]
    if is_redrawn:
        split = completed(np.zeros_like(split), codes)
    if labels is not None:
        codes, class_names = overlay([rows.path[i] for i in first], codes, class_names, Path(labels))
        split = split if cache.catalogue.has_given_split else completed(split, codes)
    return replace(table, labels=codes[table.row], class_names=class_names, split=split[table.row])


def _open(cache: str | Path | Extraction, *, backbone: str, weights: str, cache_dir: Path | str | None) -> Cache:
    folder = Path(cache) if isinstance(cache, (str, Path)) else cache.cache
    if is_cache(folder):
        return open_cache(folder)
    # DATA: its files are listed, for which Pillow is loaded, and its cache is found by the weights' digest, which
    # takes torch: a CACHE needs neither.
    from transfercache.images.sources import read_source

    manifest = read_source(folder)
    from transfercache.commands.extract import find_cache_of

    root = cache_root(cache_dir)
    found = find_cache_of(manifest, backbone=backbone, weights=weights, cache_dir=root)
    words = ["tlc", "extract-features", str(folder), "--backbone", backbone, "--weights", weights]
    words += [] if cache_dir is None else ["--cache-dir", str(cache_dir)]
    if found is None:
        raise DataError(f"{folder}: no cache of it for {backbone} under {root}; make it with: {shlex.join(words)}")
    opened = open_cache(found)
    words += changed_words(storage_dtype=(opened.spec.storage_dtype, "float32"))
    if _is_stale(opened, manifest):
        raise DataError(f"{folder}: has changed since {found} was made; bring that up to date: {shlex.join(words)}")
    n_relabelled = int(np.sum(opened.rows.label[opened.rows.view == 0] != manifest.labels))
    if n_relabelled:
        logger.warning(
            "%s: %d labels are not those of its cache, which are used (bring them over with: %s)",
            folder,
            n_relabelled,
            shlex.join(words),
        )
    return opened


def _is_stale(cache: Cache, manifest: Manifest) -> bool:
    """Whether the files, or the splits or classes that the data gives, are not those of the cache.

    Labels are not among them: those of the cache may be a label file's.
    """
    first = cache.rows.view == 0
    if tuple(itertools.compress(cache.rows.path, first)) != manifest.paths:
        return True
    if cache.catalogue.has_given_split != manifest.has_given_split:
        return True
    known = cache.rows.mtime_ns[first]  # -1 where the file was too young for its time to prove anything
    differs = (cache.rows.size[first] != manifest.size) | ((known >= 0) & (known != manifest.mtime_ns))
    if manifest.has_given_split:
        differs |= cache.rows.split[first] != manifest.split
    is_renamed = bool(manifest.class_names) and manifest.class_names != cache.class_names
    return is_renamed or bool(differs.any())


def _reported_rows(table: FeatureTable, *, tta: bool) -> FeatureTable | None:
    split = reported_split(table.split, table.labels)
    if split is None:
        return None
    return table.subset((table.split == split) & (table.labels >= 0) & (tta | (table.view == EVAL_VIEW)))


def _report(head: LinearHead | None, train: FeatureTable, held_out: FeatureTable) -> Report:
    n_classes = len(train.class_names)
    first = np.flatnonzero(held_out.view == EVAL_VIEW)  # where each image's views begin
    if head is None:
        probabilities = knn_probabilities(train.features, train.labels, held_out.features, n_classes=n_classes)
    else:
        probabilities = head.probabilities(held_out.features)
    n_views = np.diff(np.append(first, len(held_out)))
    return evaluate(
        held_out.labels[first],
        np.add.reduceat(probabilities, first) / n_views[:, None],
        class_names=train.class_names,
        n_train_per_class=np.bincount(train.labels[train.view == EVAL_VIEW], minlength=n_classes),
        split=Split(held_out.split[0]).name.lower(),
    )


def _model(head: LinearHead, cache: Cache, reported: Report | None) -> Model:
    return Model(
        head=head,
        canary_logits=head.logits(cache.canaries),
        weights_source=cache.provenance[-1].weights,
        reported=None if reported is None else reported.to_json(),
    )
