from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from transfercache.comparison.results import Seconds, load_result, save_result
from transfercache.errors import ArtefactError

from .conftest import make_result


def test_run_result__figures() -> None:
    result = make_result([0, 1, 1, 1])
    assert result.n_train == 8
    assert result.predicted.tolist() == [0, 1, 1, 1]
    assert result.is_right.tolist() == [True, True, False, True]
    report = result.report()
    assert (report.accuracy, report.n, report.split) == (0.75, 4, "val")
    assert [item.n_train for item in report.per_class] == [5, 3]


def test_run_result__class_without_training_rows_counts_as_wrong() -> None:
    result = make_result([0, 1, 0, 1], n_train_per_class=np.array([5, 0]))
    assert result.predicted.tolist() == [0, 0, 0, 0]
    assert result.report().accuracy == 0.5


def test_save_result__round_trip(tmp_path: Path) -> None:
    best = {"accuracy": 0.75, "epoch": 2}
    result = make_result([0, 1, 1, 1], best_on_reported=best, backbone=None, extraction=None)
    path = tmp_path / "results" / "abc.safetensors"
    save_result(result, path)
    loaded = load_result(path)
    for item in fields(result):
        np.testing.assert_equal(getattr(loaded, item.name), getattr(result, item.name))
    assert loaded.probabilities.dtype == np.float64
    assert [item.name for item in path.parent.iterdir()] == ["abc.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": np.array([10, 11, 12, 12])}, "row must name one row"),
        ({"row": np.array([10, 11, 12])}, "row must name one row"),
        ({"target": np.array([0, 1, 0, 2])}, "target must lie between 0 and 1"),
        ({"probabilities": np.full((4, 2), np.nan)}, "between 0 and 1"),
        ({"probabilities": np.full((4, 2), 1.5)}, "between 0 and 1"),
        ({"probabilities": np.full((4, 2), 0.5, dtype=np.float32)}, "must be float64"),
        ({"probabilities": np.full((4, 3), 0.25)}, r"float64 \[4, 2\]"),
        ({"n_train_per_class": np.array([5, -1])}, "n_train_per_class"),
        ({"backbone_passes": -1}, "backbone_passes"),
    ],
)
def test_run_result__refuses_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_result([0, 1, 1, 1], **change)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_seconds__must_be_a_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        Seconds(1.0, 1.0, {"fit": seconds})


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "abc.safetensors"
    save_result(make_result([0, 1, 1, 1]), path)
    return path


def rewrite(path: Path, *, arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> None:
    """Replace fields of a kept result, as a file that is not ours would have them; None removes one."""
    with safetensors.safe_open(path, framework="np") as file:
        document = {**json.loads(file.metadata()["tlc"]), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()} | (arrays or {})  # noqa: SIM118 - no mapping
    document = {name: value for name, value in document.items() if value is not REMOVED}
    path.write_bytes(safetensors.numpy.save(tensors, {"tlc": json.dumps(document)}))


REMOVED = object()
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"schema_version": 2}, "schema 2"),
    ({"schema_version": REMOVED}, "schema_version"),
    ({"class_names": ["blue"]}, "two classes or more"),
    ({"class_names": 7}, "not iterable"),
    ({"arrays": {"row": np.array([10, 11, 12])}}, "row must name one row"),
    ({"arrays": {"target": np.array([0, 1, 0, -1])}}, "target must lie"),
    ({"arrays": {"probabilities": np.full((4, 2), np.nan)}}, "between 0 and 1"),
    ({"seconds": {"first": 1.0, "again": 1.0}}, "stages"),
    ({"seconds": {"first": "1", "again": 1.0, "stages": {}}}, "real number"),
    ({"seconds": {"first": -1.0, "again": 1.0, "stages": {}}}, "not negative"),
    ({"seconds": {"first": float("inf"), "again": 1.0, "stages": {}}}, "Infinity is not JSON"),
    ({"date": REMOVED}, "missing 1 required"),
    ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_load_result__says_what_is_wrong(kept: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(kept, **changes)
    with pytest.raises(ArtefactError, match=message) as caught:
        load_result(kept)
    assert str(caught.value).startswith(f"{kept}: not a result of this tlc")
    assert "--fresh" in str(caught.value)


@pytest.mark.parametrize("text", ["", "7", "[]", "[" * 100_000, '{"seconds": {}}'])
def test_load_result__metadata_is_none_of_ours(kept: Path, text: str) -> None:
    kept.write_bytes(safetensors.numpy.save({}, {"tlc": text}))
    with pytest.raises(ArtefactError, match="not a result of this tlc"):
        load_result(kept)


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -8])
def test_load_result__torn(kept: Path, n_bytes: int) -> None:
    kept.write_bytes(kept.read_bytes()[:n_bytes])
    with pytest.raises(ArtefactError, match="not a result of this tlc"):
        load_result(kept)


def test_load_result__not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="No such file"):
        load_result(tmp_path / "abc.safetensors")
