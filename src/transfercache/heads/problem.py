"""What every solver is given, `Problem`, and what it gives back, `Affine`: both on raw embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: What was selected and how, in JSON's types; it travels in the MODEL file.
Chosen = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a user may ask of a solver; each reads its own (`fit.SETTINGS_OF`)."""

    C: float | None  # inverse strength of the l2 penalty, scikit-learn's; None: chosen by cross-validation
    optimizer: str
    seed: int


@dataclass(frozen=True, eq=False)
class Problem:
    """Labelled rows to fit; the K targets are numbered without gaps, each with at least one row."""

    features: Float32Array  # [N, D], raw embeddings
    targets: Int64Array  # [N], 0..K-1
    row_weights: Float64Array  # [N]
    is_scored: (
        BoolArray  # [N], rows that a held-out loss is taken over: each image once, as the eval transform shows it
    )
    component: Int64Array  # [N], rows that no fold may separate share a number
    settings: Settings

    @property
    def n_targets(self) -> int:
        """K, the number of classes to tell apart."""
        return int(self.targets.max()) + 1

    def subset(self, rows: Int64Array) -> Problem:
        """Return the rows with these indices, in that order."""
        return replace(
            self,
            features=self.features[rows],
            targets=self.targets[rows],
            row_weights=self.row_weights[rows],
            is_scored=self.is_scored[rows],
            component=self.component[rows],
        )


@dataclass(frozen=True, eq=False)
class Affine:
    """Logits as an affine map of the embedding."""

    weight: Float64Array  # [K, D]
    bias: Float64Array  # [K]

    def logits(self, features: Float64Array) -> Float64Array:
        """Return float64 [M, K] for features [M, D]."""
        return np.asarray(features @ self.weight.T + self.bias)


class Solver(Protocol):
    """Fits a problem: the map on raw embeddings, and what was chosen on the way."""

    def __call__(self, problem: Problem) -> tuple[Affine, Chosen]:
        """Fit all rows, in the settings that the problem asks for or that its own rows choose."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Standardisation by column, as scikit-learn's StandardScaler has it (population standard deviation)."""

    mean: Float64Array  # [D]
    deviation: Float64Array  # [D], 1 where the column is constant

    @classmethod
    def of(cls, features: Float32Array) -> Scale:
        """Measure the columns of float32 [N, D] in float64."""
        mean = features.mean(axis=0, dtype=np.float64)
        deviation = features.std(axis=0, dtype=np.float64)
        # What float32 cannot tell from the mean is rounding: blowing it up to unit variance would fit noise.
        smallest = np.finfo(np.float32).eps * np.abs(mean) + np.finfo(np.float32).tiny / np.finfo(np.float32).eps
        return cls(mean, np.where(deviation > smallest, deviation, 1.0))

    def apply(self, features: Float32Array) -> Float64Array:
        """Return the standardised features, float64 [N, D]."""
        x = features - self.mean
        x /= self.deviation
        return x

    def fold(self, weight: Float64Array, bias: Float64Array) -> Affine:
        """Turn a map on standardised features into the same map on raw ones."""
        raw = weight / self.deviation
        return Affine(raw, bias - raw @ self.mean)
