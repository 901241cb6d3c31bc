from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from transfercache.comparison.results import RunResult, Seconds, load_result, save_result
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
    path = tmp_path / "results" / "abc.json"
    save_result(result, path)
    loaded = load_result(path)
    assert loaded.to_json() == result.to_json()
    assert loaded.seconds == result.seconds
    np.testing.assert_array_equal(loaded.probabilities, result.probabilities)
    assert sorted(item.name for item in path.parent.iterdir()) == ["abc.json", "abc.safetensors"]


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


HOSTILE: list[tuple[str, Any, str]] = [
    ("schema_version", 2, "schema 2"),
    ("schema_version", None, "schema None"),
    ("strategy", 7, "strategy must be of type str"),
    ("backbone", 7, "backbone must be of type str or NoneType"),
    ("seed", True, "seed must be of type int"),
    ("seed", 0.0, "seed must be of type int"),
    ("class_names", ["blue", 7], "class_names must be a list of strings"),
    ("class_names", ["blue"], "two classes or more"),
    ("row", [10, 11, 12, "13"], "row must be a list of whole numbers"),
    ("row", [10, 11, 12, True], "row must be a list of whole numbers"),
    ("row", [10, 11, 12, 1 << 70], "row must be a list of whole numbers"),
    ("row", {"0": 10}, "row must be of type list"),
    ("target", [0, 1, 0, -1], "target must lie"),
    ("predicted", [0, 1, 1, 0], "predicted does not follow"),
    ("seconds", {"first": 1.0, "again": 1.0}, "first, again and stages"),
    ("seconds", {"first": "1", "again": 1.0, "stages": {}}, "seconds must be numbers"),
    ("seconds", {"first": -1.0, "again": 1.0, "stages": {}}, "not negative"),
    ("chosen", [], "chosen must be of type dict"),
    ("extraction", "yes", "extraction must be of type dict or NoneType"),
    ("surprise", 1, r"\['surprise'\] are missing or unknown"),
]


@pytest.mark.parametrize(("name", "value", "message"), HOSTILE)
def test_from_json__names_the_field_that_is_wrong(name: str, value: Any, message: str) -> None:
    result = make_result([0, 1, 1, 1])
    document = copy.deepcopy(result.to_json())
    document[name] = value
    with pytest.raises(ValueError, match=message):
        RunResult.from_json(document, result.probabilities)


def test_from_json__lacks_a_field() -> None:
    document = make_result([0, 1]).to_json()
    del document["target"]
    with pytest.raises(ValueError, match=r"\['target'\] are missing or unknown"):
        RunResult.from_json(document, make_result([0, 1]).probabilities)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "abc.json"
    save_result(make_result([0, 1, 1, 1]), path)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seconds": NaN}', "NaN is not a number"),
        (b'{"seconds": 1e999}', "another one"),
        (b"\xc3(", "codec can.t decode"),
    ],
)
def test_load_result__document_is_none_of_ours(kept: Path, data: bytes, message: str) -> None:
    kept.write_bytes(data)
    with pytest.raises(ArtefactError, match=message) as caught:
        load_result(kept)
    assert str(caught.value).startswith(f"{kept}: not a result of this tlc")
    assert "--fresh" in str(caught.value)


def test_load_result__array_file_is_another_one(kept: Path) -> None:
    kept.with_suffix(".safetensors").write_bytes(safetensors.numpy.save({"probabilities": np.full((4, 2), 0.5)}))
    with pytest.raises(ArtefactError, match="the array file beside it is another one"):
        load_result(kept)


def test_load_result__array_file_is_torn(kept: Path) -> None:
    arrays = kept.with_suffix(".safetensors")
    torn = arrays.read_bytes()[:-8]
    arrays.write_bytes(torn)
    with pytest.raises(ArtefactError, match="another one"):
        load_result(kept)


def test_load_result__array_file_is_not_there(kept: Path) -> None:
    kept.with_suffix(".safetensors").unlink()
    with pytest.raises(ArtefactError, match="No such file"):
        load_result(kept)


def test_load_result__infinite_seconds(kept: Path) -> None:
    document = json.loads(kept.read_text())
    document["seconds"]["first"] = 0.0
    kept.write_text(json.dumps(document).replace('"first": 0.0', '"first": 1e999'))
    with pytest.raises(ArtefactError, match="finite and not negative"):
        load_result(kept)
