"""`pixels-knn`: small grey images as they are, which is what no network gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfercache.cache.table import FeatureTable
from transfercache.comparison.cached import fit_knn
from transfercache.comparison.rows import EVAL_VIEW, ComparedRows, load_pixels
from transfercache.comparison.strategy import Outcome, Setting, Source, Strategy, uncached
from transfercache.images.transforms import grey_pixels
from transfercache.spec import ExtractSpec, Preprocessing
from transfercache.stopwatch import Stopwatch

#: Enough to see a shape, and as many numbers (1,024) as a large embedding has.
SIDE = 32


def pixels_knn() -> Strategy:
    """Cosine k nearest neighbours of the whole image as 32 x 32 grey values."""
    return Strategy(
        name="pixels-knn",
        source=Source.PIXELS,
        run=_run,
        options=lambda setting: {"side": SIDE},
        is_seeded=False,
    )


def _run(setting: Setting, seed: int) -> Outcome:
    rows, watch = setting.rows, Stopwatch()
    with watch.stage("decode"):
        pixels = load_pixels(rows.manifest, lambda image: grey_pixels(image, SIDE), workers=setting.workers)
    with watch.stage("predict"):
        table = _table(rows, pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255))
        predict, chosen = fit_knn(table.subset(rows.is_train), seed)
        probabilities = predict(table.features[rows.is_reported])
    return Outcome(probabilities, uncached(watch.seconds()), passes=0, chosen={**chosen, "side": SIDE})


def _table(rows: ComparedRows, features: npt.NDArray[np.float32]) -> FeatureTable:
    """Dress float32 [n, D] of the compared rows as a table, which is what kNN takes."""
    manifest = rows.manifest
    grey = Preprocessing(SIDE, SIDE, "bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), colour="grey")
    return FeatureTable(
        features=features,
        labels=manifest.labels,
        split=manifest.split,
        view=np.full(len(features), EVAL_VIEW, dtype=np.uint8),
        group=manifest.component(),
        row=rows.row,
        class_names=manifest.class_names,
        spec=ExtractSpec("pixels", "0" * 64, "pixels", grey),
        paths=manifest.paths,
    )
