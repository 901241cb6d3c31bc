"""What every solver is given, `Problem`, and what it gives back, `Affine`: both on raw embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import BoolArray, Float64Array, Int64Array
from transfercache.cache.blocks import FeatureBlocks

#: What was selected and how, in JSON's types; it travels in the MODEL file.
Chosen = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Problem:
    """Labelled rows to fit; each of the K targets has at least one row in the problem that a user poses.

    Of what a user may ask, each solver reads its own (`fit.SETTINGS_OF`).
    """

    blocks: FeatureBlocks  # [N, D], raw embeddings
    targets: Int64Array  # [N], 0..K-1
    n_targets: int  # K, the number of classes to tell apart
    row_weights: Float64Array  # [N]
    is_scored: (
        BoolArray  # [N], rows that a held-out loss is taken over: each image once, as the eval transform shows it
    )
    component: Int64Array  # [N], rows that no fold may separate share a number
    C: float | None  # inverse strength of the l2 penalty, scikit-learn's; None: chosen by cross-validation
    optimizer: str
    seed: int

    def subset(self, rows: Int64Array) -> Problem:
        """Return the rows with these indices, in that order; no feature is read."""
        return replace(
            self,
            blocks=self.blocks.take(rows),
            targets=self.targets[rows],
            row_weights=self.row_weights[rows],
            is_scored=self.is_scored[rows],
            component=self.component[rows],
        )

    @property
    def n_multiplications(self) -> int:
        """N * D * K: those of all logits once."""
        n_rows, dim = self.blocks.shape
        return n_rows * dim * self.n_targets


@dataclass(frozen=True, eq=False)
class Affine:
    """Logits as an affine map of the embedding."""

    weight: Float64Array  # [K, D]
    bias: Float64Array  # [K]

    def logits(self, features: npt.NDArray[Any]) -> Float64Array:
        """Return float64 [M, K] for features [M, D]."""
        return np.asarray(features.astype(np.float64, copy=False) @ self.weight.T + self.bias)


#: Fits all rows of a problem, in the settings that it asks for or that its own rows choose: the map on raw embeddings,
#: and what was chosen on the way.
Solver = Callable[[Problem], tuple[Affine, Chosen]]
