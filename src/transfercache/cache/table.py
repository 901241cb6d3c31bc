"""`FeatureTable`: feature rows joined with what is known about each; what every solver is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.cache.blocks import FeatureBlocks
from transfercache.spec import ExtractSpec

#: The view that is evaluated: of the eval transform.
EVAL_VIEW = 0


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """N rows in the order of the manifest's rows (and of the views within one); `features` are read when asked for.

    `group` is the number of the row's component: no split or fold separates rows that share it.
    """

    blocks: FeatureBlocks  # [N, D]; the cache's are finite
    labels: npt.NDArray[np.int64]  # int64 [N], index into class_names, -1 where unlabelled
    split: npt.NDArray[np.uint8]  # uint8 [N], splits.Split
    view: npt.NDArray[np.uint8]  # uint8 [N], 0 is the eval transform
    group: npt.NDArray[np.int64]  # int64 [N]
    row: npt.NDArray[np.int64]  # int64 [N], row of the manifest
    class_names: tuple[str, ...]  # [C]
    spec: ExtractSpec
    paths: tuple[str, ...]  # [N]

    def __post_init__(self) -> None:
        for name, dtype in _ROW_ARRAYS.items():
            array = getattr(self, name)
            if array.shape != (len(self),) or array.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} [{len(self)}], got {array.dtype} {array.shape}")
        if len(self.paths) != len(self):
            raise ValueError(f"{len(self.paths)} paths for {len(self)} rows")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(f"labels must lie between -1 and {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return self.blocks.shape[0]

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """The embeddings, float32 [N, D], all in memory."""
        return self.blocks.read(0, len(self))

    def subset(self, index: npt.NDArray[Any]) -> FeatureTable:
        """Return the rows of a mask, bool [N], or of an index, int [M], in that order; features are not read."""
        chosen = np.flatnonzero(index) if index.dtype == np.bool_ else index
        arrays = {name: getattr(self, name)[chosen] for name in _ROW_ARRAYS}
        paths = tuple(self.paths[i] for i in chosen.tolist())
        return replace(self, blocks=self.blocks.take(chosen), **arrays, paths=paths)


_ROW_ARRAYS = {
    "labels": np.dtype(np.int64),
    "split": np.dtype(np.uint8),
    "view": np.dtype(np.uint8),
    "group": np.dtype(np.int64),
    "row": np.dtype(np.int64),
}
