"""k nearest neighbours by cosine similarity: nothing is trained, it only evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.arrays import Float32Array, Float64Array, Int64Array
from transfercache.cache.blocks import FeatureBlocks, in_order
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import DataError

#: Similarities held at once: 16 MiB of float32, and about as much again for each mask over them.
BLOCK_ELEMENTS = 1 << 22
#: A vote is 1 plus this much of its similarity, which orders classes of equal votes and outweighs no vote.
TIE_WEIGHT = 1e-6


def knn_probabilities(
    rows: FeatureBlocks, labels: Int64Array, queries: Float32Array, *, n_classes: int, k: int = config.KNN_NEIGHBOURS
) -> Float64Array:
    """Return float64 [M, C]: each class's share of the votes of the k nearest labelled rows, for queries [M, D].

    The rows [N, D] have `labels` [N], -1 where unlabelled, and are read once, block by block.
    A tie in votes goes to the class of larger summed similarity: it is ahead by some 1e-6. Of rows equally near the
    earlier vote. With fewer than k rows all of them vote. Raises DataError where no row is labelled.
    """
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) == 0:
        raise DataError("kNN needs labelled training rows, and there is none; give labels with --labels FIXES.csv")
    nearest = _nearest_rows(rows.take(labelled), labels[labelled], _unit_length(queries), k=min(k, len(labelled)))
    # Mapped from [-1, 1] to [0, 1], so that a neighbour never counts against its class.
    nearness = (1 + nearest.similarity.astype(np.float64)) / 2
    votes = _count(nearest.labels, 1 + TIE_WEIGHT * nearness, n_classes)
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Images whose nearest ones vote: what predicts in place of a `LinearHead`."""

    images: FeatureTable

    @classmethod
    def of(cls, train: FeatureTable) -> Neighbours:
        """Keep the images as the eval transform shows them: more views would be each other's neighbours."""
        return cls(train.subset(train.view == EVAL_VIEW))

    @property
    def chosen(self) -> dict[str, Any]:
        """What a head's `chosen` is."""
        return {"neighbours": config.KNN_NEIGHBOURS}

    def probabilities(self, x: Float32Array) -> Float64Array:
        """Return float64 [M, C] for raw embeddings float32 [M, D]."""
        images = self.images
        return knn_probabilities(images.blocks, images.labels, x, n_classes=len(images.class_names))


class _Nearest(NamedTuple):
    similarity: Float32Array  # [M, k]
    labels: Int64Array  # [M, k]


def _nearest_rows(rows: FeatureBlocks, labels: Int64Array, queries: Float32Array, *, k: int) -> _Nearest:
    found = _Nearest(np.full((len(queries), k), -np.inf, np.float32), np.zeros((len(queries), k), np.int64))
    for place, features in in_order(rows):
        block, own = _unit_length(features), labels[place]
        n_queries = max(1, BLOCK_ELEMENTS // len(block))
        for start in range(0, len(queries), n_queries):
            similarity = queries[start : start + n_queries] @ block.T  # float32 [B, rows]
            # After the first blocks few have a nearer row; one as near came too late.
            better = np.flatnonzero(similarity.max(axis=1) > found.similarity[start : start + n_queries].min(axis=1))
            at = start + better
            candidates = np.hstack([found.similarity[at], similarity[better]])
            columns = _largest(candidates, k)  # [B, k]
            known = np.hstack([found.labels[at], np.broadcast_to(own, (len(at), len(own)))])
            found.similarity[at] = np.take_along_axis(candidates, columns, axis=1)
            found.labels[at] = np.take_along_axis(known, columns, axis=1)
    return found


def _count(labels: Int64Array, votes: Float64Array, n_classes: int) -> Float64Array:
    """Return float64 [B, C]: the sum of `votes` [B, k] by their `labels` [B, k]."""
    cells = np.arange(len(labels))[:, None] * n_classes + labels
    counts = np.bincount(cells.ravel(), weights=votes.ravel(), minlength=len(labels) * n_classes)
    return np.asarray(counts.reshape(len(labels), n_classes), dtype=np.float64)


def _unit_length(features: Float32Array) -> Float32Array:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(norms > 0, norms, 1))


def _largest(similarity: Float32Array, k: int) -> npt.NDArray[np.intp]:
    """Return [B, k]: per row the columns of the k largest values, in column order; of equal ones the first."""
    kth = np.partition(similarity, -k, axis=1)[:, -k, None]
    above, at = similarity > kth, similarity == kth
    n_missing = k - above.sum(axis=1, keepdims=True)
    is_nearest = above | (at & (np.cumsum(at, axis=1, dtype=np.int32) <= n_missing))
    return np.nonzero(is_nearest)[1].reshape(len(similarity), k)
