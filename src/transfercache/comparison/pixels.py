"""`pixels-knn`: small grey images as they are, which is what no network gives."""

from __future__ import annotations

from functools import partial

import numpy as np

from transfercache import config
from transfercache.cache.blocks import ArrayBlocks
from transfercache.comparison.rows import load_pixels
from transfercache.comparison.strategy import Outcome, Setting, Source, Strategy, uncached
from transfercache.heads.knn import knn_probabilities
from transfercache.images.transforms import grey_pixels
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
        pixels = load_pixels(rows.manifest, partial(grey_pixels, side=SIDE), workers=setting.workers)
    with watch.stage("predict"):
        features = pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)  # float32 [n, SIDE * SIDE]
        probabilities = knn_probabilities(
            ArrayBlocks(features[rows.is_train]),
            rows.manifest.labels[rows.is_train],
            features[rows.is_reported],
            n_classes=len(rows.manifest.class_names),
        )
    chosen = {"neighbours": config.KNN_NEIGHBOURS, "side": SIDE}
    return Outcome(probabilities, uncached(watch.seconds()), passes=0, chosen=chosen)
