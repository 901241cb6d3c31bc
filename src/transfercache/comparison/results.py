"""`RunResult`: one strategy, one seed, its answers on the reported rows and their cost; kept as JSON. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from transfercache.errors import ArtefactError
from transfercache.files import resource_errors, sha256_bytes, write_atomic
from transfercache.metrics import Report, evaluate, predicted_classes

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

RESULT_SCHEMA_VERSION = 1
#: Ten million reported rows take some 250 MB of JSON; more than this is not ours.
_MAX_BYTES = 1 << 30


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

    def to_json(self) -> dict[str, Any]:
        """Return everything but the probabilities as plain values."""
        return {
            "schema_version": RESULT_SCHEMA_VERSION,
            "strategy": self.strategy,
            "backbone": self.backbone,
            "seed": self.seed,
            "split": self.split,
            "class_names": list(self.class_names),
            "n_train_per_class": self.n_train_per_class.tolist(),
            "row": self.row.tolist(),
            "target": self.target.tolist(),
            "predicted": self.predicted.tolist(),
            "seconds": asdict(self.seconds),
            "backbone_passes": self.backbone_passes,
            "chosen": dict(self.chosen),
            "best_on_reported": None if self.best_on_reported is None else dict(self.best_on_reported),
            "extraction": None if self.extraction is None else dict(self.extraction),
            "environment": dict(self.environment),
            "date": self.date,
            "tlc_version": self.tlc_version,
        }

    @classmethod
    def from_json(cls, value: Any, probabilities: Float64Array) -> RunResult:
        """Build a result from untrusted JSON and its array; raises ValueError naming the first field that is wrong."""
        fields = _checked_fields(value)
        predicted = _integers(fields, "predicted")
        arrays = {name: _integers(fields, name) for name in ("n_train_per_class", "row", "target")}
        plain: dict[str, Any] = {name: fields[name] for name in _FIELD_TYPES if name not in (*arrays, *_NOT_PASSED_ON)}
        result = cls(
            **plain,
            n_train_per_class=arrays["n_train_per_class"],
            row=arrays["row"],
            target=arrays["target"],
            class_names=_strings(fields, "class_names"),
            seconds=_seconds(fields["seconds"]),
            probabilities=probabilities,
        )
        if not np.array_equal(predicted, result.predicted):
            raise ValueError("predicted does not follow from the probabilities")
        return result


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "strategy": (str,),
    "backbone": (str, type(None)),
    "seed": (int,),
    "split": (str,),
    "class_names": (list,),
    "n_train_per_class": (list,),
    "row": (list,),
    "target": (list,),
    "predicted": (list,),
    "seconds": (dict,),
    "backbone_passes": (int,),
    "chosen": (dict,),
    "best_on_reported": (dict, type(None)),
    "extraction": (dict, type(None)),
    "environment": (dict,),
    "date": (str,),
    "tlc_version": (str,),
}
_NOT_PASSED_ON = ("schema_version", "class_names", "predicted", "seconds")


def _checked_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a result must be a JSON object")
    if value.get("schema_version") != RESULT_SCHEMA_VERSION:
        raise ValueError(f"schema {value.get('schema_version')!r}, this tlc reads {RESULT_SCHEMA_VERSION}")
    if set(value) != set(_FIELD_TYPES):
        raise ValueError(f"the fields {sorted(set(value) ^ set(_FIELD_TYPES))} are missing or unknown")
    for name, kinds in _FIELD_TYPES.items():
        if type(value[name]) not in kinds:
            raise ValueError(f"{name} must be of type {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _integers(fields: Mapping[str, Any], name: str) -> Int64Array:
    # type(), as True would pass for 1; the bound keeps numpy from overflowing.
    if not all(type(item) is int and abs(item) < 1 << 62 for item in fields[name]):
        raise ValueError(f"{name} must be a list of whole numbers")
    return np.array(fields[name], dtype=np.int64)


def _strings(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    if not all(isinstance(item, str) for item in fields[name]):
        raise ValueError(f"{name} must be a list of strings")
    return tuple(fields[name])


def _seconds(value: Mapping[str, Any]) -> Seconds:
    stages = value.get("stages")
    if set(value) != {"first", "again", "stages"} or not isinstance(stages, dict):
        raise ValueError("seconds must have first, again and stages")
    if not all(type(item) in (int, float) for item in (value["first"], value["again"], *stages.values())):
        raise ValueError("seconds must be numbers")
    return Seconds(float(value["first"]), float(value["again"]), {name: float(item) for name, item in stages.items()})


def save_result(result: RunResult, path: Path) -> None:
    """Write `path` (.json) and, before it, the probabilities beside it (.safetensors): a JSON file has its array."""
    arrays = safetensors.numpy.save({"probabilities": np.ascontiguousarray(result.probabilities)})
    document = {**result.to_json(), "arrays": sha256_bytes(arrays)}
    with resource_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_suffix(".safetensors"), arrays)
    write_atomic(path, json.dumps(document, allow_nan=False).encode())


def load_result(path: Path) -> RunResult:
    """Read and validate what `save_result` wrote; raises ArtefactError naming the file and what is wrong with it."""
    try:
        document = _parse(_read(path))
        if not isinstance(document, dict):
            raise ValueError("a result must be a JSON object")
        arrays = _read(path.with_suffix(".safetensors"))
        if document.pop("arrays", None) != sha256_bytes(arrays):
            raise ValueError("the array file beside it is another one")
        probabilities = safetensors.numpy.load(arrays)["probabilities"]
        return RunResult.from_json(document, probabilities)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path}: not a result of this tlc ({error}); delete it, or pass --fresh") from error


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_BYTES >> 30} GiB")
    return path.read_bytes()


def _parse(data: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
