"""k nearest neighbours by cosine similarity: nothing is trained, it only evaluates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.errors import DataError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

#: Similarities held at once: 16 MiB of float32, and about as much again for each mask over them.
BLOCK_ELEMENTS = 1 << 22
#: A vote is 1 plus this much of its similarity, which orders classes of equal votes and outweighs no vote.
TIE_WEIGHT = 1e-6


def knn_probabilities(
    features: Float32Array, labels: Int64Array, queries: Float32Array, *, n_classes: int, k: int = config.KNN_NEIGHBOURS
) -> Float64Array:
    """Return float64 [M, C]: each class's share of the votes of the k nearest labelled rows, for queries [M, D].

    The rows are `features` [N, D] with `labels` [N], -1 where unlabelled.
    A tie in votes goes to the class of larger summed similarity: it is ahead by some 1e-6. Of rows equally near the
    earlier vote. With fewer than k rows all of them vote. Raises DataError where no row is labelled.
    """
    features, labels = features[labels >= 0], labels[labels >= 0]
    if len(labels) == 0:
        raise DataError("kNN needs labelled training rows, and there is none; give labels with --labels FIXES.csv")
    rows = _unit_length(features)  # float32 [N, D]
    n_neighbours = min(k, len(labels))
    probabilities = np.empty((len(queries), n_classes))
    block_rows = max(1, BLOCK_ELEMENTS // len(labels))
    for start in range(0, len(queries), block_rows):
        similarity = _unit_length(queries[start : start + block_rows]) @ rows.T  # float32 [B, N]
        neighbours = _nearest(similarity, n_neighbours)  # [B, k]
        # Mapped from [-1, 1] to [0, 1], so that a neighbour never counts against its class.
        nearness = (1 + np.take_along_axis(similarity, neighbours, axis=1).astype(np.float64)) / 2
        votes = _count(labels[neighbours], 1 + TIE_WEIGHT * nearness, n_classes)
        probabilities[start : start + block_rows] = votes / votes.sum(axis=1, keepdims=True)
    return probabilities


def _count(labels: Int64Array, votes: Float64Array, n_classes: int) -> Float64Array:
    """Return float64 [B, C]: the sum of `votes` [B, k] by their `labels` [B, k]."""
    cells = np.arange(len(labels))[:, None] * n_classes + labels
    counts = np.bincount(cells.ravel(), weights=votes.ravel(), minlength=len(labels) * n_classes)
    return np.asarray(counts.reshape(len(labels), n_classes), dtype=np.float64)


def _unit_length(features: Float32Array) -> Float32Array:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(norms > 0, norms, 1))


def _nearest(similarity: Float32Array, k: int) -> npt.NDArray[np.intp]:
    """Return [B, k]: per row the columns of the k largest values, in column order; of equal ones the first."""
    kth = np.partition(similarity, -k, axis=1)[:, -k, None]
    above, at = similarity > kth, similarity == kth
    n_missing = k - above.sum(axis=1, keepdims=True)
    is_nearest = above | (at & (np.cumsum(at, axis=1, dtype=np.int32) <= n_missing))
    return np.nonzero(is_nearest)[1].reshape(len(similarity), k)
