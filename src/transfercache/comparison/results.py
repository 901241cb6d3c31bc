"""`RunResult`: one strategy, one seed, its answers on the reported rows and their cost; kept in a file. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from transfercache.arrays import Float64Array, Int64Array
from transfercache.errors import ArtefactError
from transfercache.files import resource_errors, write_atomic
from transfercache.metrics import Report, evaluate, predicted_classes
from transfercache.strict_json import parse

RESULT_SCHEMA_VERSION = 1
_METADATA_KEY = "tlc"
#: The parts of a result that are tensors of its file; all others are JSON in its metadata.
_ARRAYS = ("n_train_per_class", "row", "target", "probabilities")


@dataclass(frozen=True)
class Seconds:
    """Wall seconds of the first run from nothing, of every further one, and by stage (docs/statistics.md)."""

    first: float
    again: float
    stages: Mapping[str, float]

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in (self.first, self.again, *self.stages.values())):
            raise ValueError("seconds must be finite and not negative")


@dataclass(frozen=True, eq=False)
class RunResult:
    """The reported split was read once for it, after every choice; `best_on_reported` alone was chosen on that split.

    Raises ValueError, naming the field, where the parts do not fit together.
    """

    strategy: str
    backbone: str | None  # None: no network is in it
    seed: int
    split: str  # the reported one
    class_names: tuple[str, ...]  # [C]
    n_train_per_class: Int64Array  # int64 [C]
    row: Int64Array  # int64 [M], rows of the manifest
    target: Int64Array  # int64 [M]
    probabilities: Float64Array  # float64 [M, C]
    seconds: Seconds
    backbone_passes: int  # image forwards, evaluation included
    chosen: Mapping[str, Any]  # what was selected and how, and the options it ran with
    best_on_reported: Mapping[str, Any] | None  # accuracy, epoch: what the tutorial prints as its best
    extraction: Mapping[str, Any] | None  # the record of the cache's extraction, where `seconds.first` has it
    environment: Mapping[str, Any]
    date: str  # ISO 8601, UTC
    tlc_version: str

    def __post_init__(self) -> None:
        n_classes, n_rows = len(self.class_names), len(self.target)
        if n_classes < 2 or self.n_train_per_class.shape != (n_classes,) or self.n_train_per_class.min() < 0:
            raise ValueError("n_train_per_class must be a count for each of two classes or more")
        if not n_rows or self.row.shape != (n_rows,) or len(np.unique(self.row)) != n_rows or self.row.min() < 0:
            raise ValueError("row must name one row of the manifest for each target")
        if self.target.min() < 0 or self.target.max() >= n_classes:
            raise ValueError(f"target must lie between 0 and {n_classes - 1}")
        if self.probabilities.shape != (n_rows, n_classes) or self.probabilities.dtype != np.float64:
            raise ValueError(f"probabilities must be float64 [{n_rows}, {n_classes}]")
        if not np.isfinite(self.probabilities).all() or self.probabilities.min() < 0 or self.probabilities.max() > 1:
            raise ValueError("probabilities must lie between 0 and 1")
        if self.backbone_passes < 0:
            raise ValueError("backbone_passes must not be negative")

    @property
    def n_train(self) -> int:
        """How many rows it was trained on."""
        return int(self.n_train_per_class.sum())

    @property
    def predicted(self) -> Int64Array:
        """int64 [M]: the most probable class that has training rows."""
        return predicted_classes(self.probabilities, n_train_per_class=self.n_train_per_class)

    @property
    def is_right(self) -> npt.NDArray[np.bool_]:
        """bool [M]: the rows that were predicted right."""
        return np.asarray(self.predicted == self.target)

    def report(self) -> Report:
        """Return the figures on the reported split."""
        return evaluate(
            self.target,
            self.probabilities,
            class_names=self.class_names,
            n_train_per_class=self.n_train_per_class,
            split=self.split,
        )


def save_result(result: RunResult, path: Path) -> None:
    """Write a result to `path` (.safetensors), replacing it atomically; missing parent folders are made."""
    arrays = {name: np.ascontiguousarray(getattr(result, name)) for name in _ARRAYS}
    plain = {item.name: getattr(result, item.name) for item in fields(result) if item.name not in _ARRAYS}
    document = {"schema_version": RESULT_SCHEMA_VERSION, **plain, "seconds": asdict(result.seconds)}
    metadata = {_METADATA_KEY: json.dumps(document, allow_nan=False)}
    with resource_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.numpy.save(arrays, metadata))


def load_result(path: Path) -> RunResult:
    """Read what `save_result` wrote; raises ArtefactError naming the file and what is wrong with it.

    The checks are those of `RunResult`: whatever fails them is only computed again.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            document = parse(file.metadata()[_METADATA_KEY].encode())
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        version = document.pop("schema_version")
        if version != RESULT_SCHEMA_VERSION:
            raise ValueError(f"schema {version!r}, this tlc reads {RESULT_SCHEMA_VERSION}")
        class_names, seconds = tuple(document.pop("class_names")), Seconds(**document.pop("seconds"))
        return RunResult(class_names=class_names, seconds=seconds, **document, **arrays)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:
        raise ArtefactError(f"{path}: not a result of this tlc ({error}); delete it, or pass --fresh") from error
