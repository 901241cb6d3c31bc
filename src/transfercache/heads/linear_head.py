"""`LinearHead`: what every solver ends in, logits as an affine map of the raw embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transfercache.arrays import BoolArray, Float32Array, Float64Array, Int64Array
from transfercache.errors import DataError
from transfercache.metrics import softmax
from transfercache.spec import ExtractSpec

#: The bias of a class without training rows, its weights being zero: as the other logits sum to zero, the largest is
#: not negative, and exp(-1e4) is exactly 0 in float64 while the file stays free of infinities.
UNTRAINED_BIAS = -1e4


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Weights and bias with the standardisation folded in, so that heads of all solvers are interchangeable.

    `chosen` says what was selected and how, in JSON's types. Raises ValueError, naming the field, where the parts do
    not fit together: a head that exists is one that predicts.
    """

    weight: Float32Array  # [C, D], also for two classes
    bias: Float32Array  # [C]
    class_names: tuple[str, ...]
    spec: ExtractSpec
    solver: str
    n_train: int
    chosen: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        n_classes = len(self.class_names)
        if n_classes < 2 or len(set(self.class_names)) != n_classes:
            raise ValueError("class_names must be two or more different names")
        if self.weight.ndim != 2 or len(self.weight) != n_classes or self.weight.shape[1] < 1:
            raise ValueError(f"weight {self.weight.shape} must be [{n_classes}, D], one row per class")
        if self.bias.shape != (n_classes,):
            raise ValueError(f"bias {self.bias.shape} must be [{n_classes}]")
        for name, array in (("weight", self.weight), ("bias", self.bias)):
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite float32")
        if not 0 < self.temperature < np.inf or self.n_train < 1:
            raise ValueError("temperature must be positive and finite, n_train at least 1")

    @property
    def dim(self) -> int:
        """D, the length of the embeddings it takes."""
        return int(self.weight.shape[1])

    @property
    def is_trained(self) -> BoolArray:
        """bool [C]: the classes that had training rows; the logit of another is `UNTRAINED_BIAS`."""
        return np.asarray(self.bias != UNTRAINED_BIAS)

    @property
    def temperatures(self) -> Float32Array:
        """[C], what the classes' logits are divided by; not those without training, which would come within reach."""
        return np.where(self.is_trained, self.temperature, 1.0).astype(np.float32)

    def logits(self, x: Float32Array) -> Float32Array:
        """Return float32 [M, C] for raw embeddings float32 [M, D]."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"embeddings {x.shape} must be [M, {self.dim}]")
        return np.asarray(x @ self.weight.T + self.bias, dtype=np.float32)

    def probabilities(self, x: Float32Array) -> Float64Array:
        """Return float64 [M, C]: softmax of the logits over the temperature; exactly 0 for a class without training."""
        return softmax(self.logits(x) / self.temperatures)

    def predict(self, x: Float32Array) -> Int64Array:
        """Return int64 [M]: the index into `class_names` of the largest logit (ties: the first).

        Raises DataError for an embedding that is not finite, whose logits would all be ties.
        """
        bad = np.flatnonzero(~np.isfinite(x).all(axis=-1))
        if len(bad):
            raise DataError(f"embedding {bad[0]}: has values that are not finite (NaN or infinity); leave it out")
        return np.asarray(self.logits(x).argmax(axis=1), dtype=np.int64)
