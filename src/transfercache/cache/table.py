"""`FeatureTable`: feature rows joined with what is known about each; what every solver is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.spec import ExtractSpec

#: The view that is evaluated: of the eval transform.
EVAL_VIEW = 0


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """N rows in memory, in the order of the manifest's rows (and of the views within one).

    `group` is the number of the row's component: no split or fold separates rows that share it.
    """

    features: npt.NDArray[np.float32]  # float32 [N, D], C-contiguous; the cache's are finite
    labels: npt.NDArray[np.int64]  # int64 [N], index into class_names, -1 where unlabelled
    split: npt.NDArray[np.uint8]  # uint8 [N], splits.Split
    view: npt.NDArray[np.uint8]  # uint8 [N], 0 is the eval transform
    group: npt.NDArray[np.int64]  # int64 [N]
    row: npt.NDArray[np.int64]  # int64 [N], row of the manifest
    class_names: tuple[str, ...]  # [C]
    spec: ExtractSpec
    paths: tuple[str, ...]  # [N]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype != np.float32 or not self.features.flags.c_contiguous:
            raise ValueError(f"features must be C-contiguous float32 [N, D], got {self.features.shape}")
        for name, dtype in _ROW_ARRAYS.items():
            array = getattr(self, name)
            if array.shape != (len(self),) or array.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} [{len(self)}], got {array.dtype} {array.shape}")
        if len(self.paths) != len(self):
            raise ValueError(f"{len(self.paths)} paths for {len(self)} rows")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(f"labels must lie between -1 and {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def subset(self, index: npt.NDArray[Any]) -> FeatureTable:
        """Return the rows of a mask, bool [N], or of an index, int [M], in that order; arrays are copied."""
        chosen = np.flatnonzero(index) if index.dtype == np.bool_ else index
        arrays = {name: getattr(self, name)[chosen] for name in ("features", *_ROW_ARRAYS)}
        return replace(self, **arrays, paths=tuple(self.paths[i] for i in chosen.tolist()))


_ROW_ARRAYS = {
    "labels": np.dtype(np.int64),
    "split": np.dtype(np.uint8),
    "view": np.dtype(np.uint8),
    "group": np.dtype(np.int64),
    "row": np.dtype(np.int64),
}
