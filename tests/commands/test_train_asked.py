"""What train-head tells beside a head's figures: calibration, suspects, parts of the rows, and the bundled backbone."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from transfercache.backbones.registry import load_backbone
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.predict import predict
from transfercache.commands.train import train_head
from transfercache.errors import DataError, ResourceError, UsageError, WeightsError
from transfercache.heads.calibration import fit_temperature
from transfercache.heads.fit import fit_head
from transfercache.heads.knn import knn_probabilities
from transfercache.heads.learning_curve import draw_shots
from transfercache.heads.select import out_of_fold
from transfercache.metrics import calibration_error
from transfercache.models.head_file import load_model
from transfercache.randomness import derive_rng


@pytest.fixture(scope="session")
def noisy(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the 100 images of `flat`, those of every ninth turned into the other class."""
    other = {"cat": "dog", "dog": "cat"}
    names = [(path.name, path.stem[4:]) for path in sorted(flat.iterdir())]
    lines = [f"{name},{label if i % 9 else other[label]}" for i, (name, label) in enumerate(names)]
    path = tmp_path_factory.mktemp("labels") / "noisy.csv"
    path.write_text("\n".join(["path,label", *lines]))
    return path


def is_turned(path: str) -> bool:
    return int(path[:3]) % 9 == 0


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_calibrate__keeps_the_temperature_that_fits_held_out_training_images(
    unlabelled: Extraction, noisy: Path
) -> None:
    # Far too little penalty: the head is surer than it should be.
    result = train_head(unlabelled, labels=noisy, C=1e4, calibrate=True, out="head")
    plain = train_head(unlabelled, labels=noisy, C=1e4, out="plain")
    calibration, head = result.calibration, load_model(Path("head")).head
    assert calibration is not None
    assert plain.linear_head is not None
    table = _labelled(unlabelled, noisy)
    train, val = table.subset(table.split == 1), table.subset(table.split == 2)
    held = out_of_fold(train, partial(fit_head, C=1e4), seed=0)
    assert (calibration.n, calibration.is_fitted) == (len(train), True)
    assert head.temperature == calibration.temperature == fit_temperature(held.logits, train.labels)
    assert head.temperature > 1.5
    np.testing.assert_array_equal(head.weight, plain.linear_head.weight)
    # What is reported is calibrated; the argmax is what it was.
    assert result.reported is not None
    assert plain.reported is not None
    probabilities = head.probabilities(val.features)
    assert result.reported.log_loss == pytest.approx(log_loss(val.labels, probabilities))
    assert result.reported.ece == pytest.approx(
        calibration_error(probabilities.argmax(axis=1) == val.labels, probabilities.max(axis=1))
    )
    assert (calibration.uncalibrated_log_loss, calibration.uncalibrated_ece) == (
        plain.reported.log_loss,
        plain.reported.ece,
    )
    np.testing.assert_array_equal(result.reported.confusion, plain.reported.confusion)
    assert result.to_json()["calibration"]["temperature"] == head.temperature


def _labelled(extraction: Extraction, labels: Path) -> Any:
    from transfercache.commands.cached_rows import labelled_table

    return labelled_table(extraction.open(), labels=labels, val_fraction=None, split_seed=None)


def test_suspects__names_the_turned_labels_and_mended_it_is_a_label_file(
    unlabelled: Extraction, noisy: Path, tmp_path: Path
) -> None:
    result = train_head(unlabelled, labels=noisy, suspects=tmp_path / "s.csv")
    lines = read_csv(tmp_path / "s.csv")
    train = _labelled(unlabelled, noisy)
    expected = {path for path, split in zip(train.paths, train.split, strict=True) if split == 1}
    assert {line["path"] for line in lines} == expected
    n_turned = sum(map(is_turned, expected))
    assert n_turned >= 6
    assert all(is_turned(line["path"]) for line in lines[:n_turned])
    assert result.suspects is not None
    assert result.to_json()["suspects"] == {
        "file": str(tmp_path / "s.csv"),
        "n_scored": len(expected),
        "n_issues": sum(line["is_issue"] == "1" for line in lines),
        "n_unscored": 0,
    }
    assert 0 < result.suspects.n_issues <= n_turned
    mended = [(line["path"], line["suggested_label" if line["is_issue"] == "1" else "label"]) for line in lines]
    with open("mended.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *mended])
    train_head(unlabelled, labels="mended.csv", suspects="again.csv")
    again = {line["path"] for line in read_csv(Path("again.csv")) if line["is_issue"] == "1"}
    assert again.isdisjoint(line["path"] for line in lines if line["is_issue"] == "1")


def test_suspects__of_a_class_folder_that_ends_in_a_blank__fit_labels(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets / "cat", tmp_path / "data" / "cat ")
    shutil.copytree(pets / "dog", tmp_path / "data" / "dog")
    made = extract_features(tmp_path / "data", backbone="mobilenet_v3_small", weights="random", cache_dir=tmp_path)
    first = train_head(made, C=1.0, suspects="s.csv", out="head").linear_head
    again = train_head(made, C=1.0, labels="s.csv", out="head").linear_head
    assert first is not None
    assert again is not None
    assert again.class_names == ("cat ", "dog")
    np.testing.assert_array_equal(again.weight, first.weight)


def test_suspects__that_cannot_be_written__show_before_the_fit(extraction: Extraction, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ResourceError, match=r"taken: cannot be written \(Is a directory\)"):
        train_head(extraction, suspects=tmp_path / "taken", out=tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_seeds__are_runs_of_one_seed_each(unlabelled: Extraction, noisy: Path) -> None:
    result = train_head(unlabelled, labels=noisy, seeds=3, seed=4)
    singles = [train_head(unlabelled, labels=noisy, seed=seed).reported for seed in (4, 5, 6)]
    expected = [report.accuracy for report in singles if report is not None]
    (point,) = result.seeds
    np.testing.assert_array_equal(point.accuracies, expected)
    assert result.to_json()["seeds"] == {
        "fraction": 1.0,
        "n_train": 80.0,
        "repeats": 3,
        "mean": pytest.approx(np.mean(expected)),
        "deviation": pytest.approx(np.std(expected, ddof=1)),
        "min": min(expected),
        "max": max(expected),
    }


def test_shots_and_learning_curve__train_on_parts(unlabelled: Extraction, noisy: Path) -> None:
    result = train_head(unlabelled, labels=noisy, shots="5,1,5", learning_curve=True, repeats=3)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [(point["shots"], point["n_train"], point["repeats"]) for point in document["shots"]] == [
        (1, 2, 3),
        (5, 10, 3),
    ]
    assert [point["n_train"] for point in document["learning_curve"]] == [6, 10, 20, 40, 80]
    assert document["more_labels"]["n_to"] == 80
    assert document["more_labels"]["answer"] in {"yes", "no", "unclear"}
    assert document["seeds"] is None
    # The last point of the curve is the head itself, by seeds of its own.
    assert result.reported is not None
    assert result.learning_curve[-1].accuracies[0] == result.reported.accuracy
    assert set(document["seconds"]) == {"load", "fit", "parts", "total"}


@pytest.mark.parametrize("words", [{}, {"C": 1e-4}, {"solver": "knn"}])
def test_shots__answer_as_heads_of_those_rows_do(
    unlabelled: Extraction, flat: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    # Random labels, so that heads of other rows or another C answer otherwise.
    rng = np.random.default_rng(0)
    labels = tmp_path / "random.csv"
    lines = [f"{path.name},{rng.choice(['cat', 'dog'])}" for path in sorted(flat.iterdir())]
    labels.write_text("\n".join(["path,label", *lines]))
    (point,) = train_head(unlabelled, labels=labels, shots="9", repeats=3, seed=2, **words).shots
    table = _labelled(unlabelled, labels)
    train, val = table.subset(table.split == 1), table.subset(table.split == 2)
    for repeat, is_right in enumerate(point.is_right):
        part = train.subset(draw_shots(train, 9, derive_rng(2, "part", repeat)))
        if words.get("solver") == "knn":
            predicted = knn_probabilities(part.blocks, part.labels, val.features, n_classes=2).argmax(axis=1)
        else:
            predicted = fit_head(part, seed=2 + repeat, **words).predict(val.features)
        np.testing.assert_array_equal(is_right, predicted == val.labels)
    assert len({is_right.tobytes() for is_right in point.is_right}) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shots": "1,,2"}, "--shots '1,,2' must be numbers of images a class, joined by commas, such as 1,2,5,10"),
        ({"shots": "0,1"}, "--shots '0,1' must be numbers"),
        ({"shots": "1.5"}, "--shots '1.5' must be numbers"),
        ({"shots": [1.5]}, r"--shots \[1.5\] must be numbers"),
        ({"shots": []}, r"--shots \[\] must be numbers"),
        ({"shots": "7"}, r"--shots 7: class 'cat' has 6 training images \(or groups\) to draw from"),
        ({"repeats": 1}, "--seeds 1 must be at least 1, and --repeats 1 at least 2"),
        ({"seeds": 0}, "--seeds 0 must be at least 1"),
        ({"solver": "knn", "calibrate": True}, "--calibrate: knn fits no head; choose another --solver"),
        ({"solver": "knn", "suspects": "s.csv"}, "--suspects: knn fits no head"),
        ({"solver": "knn", "bundle": True}, "--bundle: knn fits no head"),
        ({"solver": "knn", "out": "foo.safetensors"}, "--out: knn fits no head; choose another --solver"),
    ],
)
def test_asked__what_cannot_be_is_refused(extraction: Extraction, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_head(extraction, **words)


def test_asked__of_data_without_a_reported_split(unlabelled: Extraction, noisy: Path) -> None:
    for words in ({"shots": "1"}, {"learning_curve": True}, {"seeds": 2}):
        with pytest.raises(DataError, match="no labelled image is in a test or val split, so no accuracy can be told"):
            train_head(unlabelled, labels=noisy, val_fraction=0.0, **words)
    result = train_head(unlabelled, labels=noisy, val_fraction=0.0, calibrate=True, suspects="s.csv")
    assert result.reported is None
    assert result.calibration is not None
    assert (result.calibration.n, result.calibration.uncalibrated_ece) == (100, None)


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """Weights of a small network that are in this file alone."""
    state = load_backbone("mobilenet_v3_small", weights="random").network.state_dict()
    path = tmp_path / "small.pth"
    torch.save({name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    return path


def test_bundle__predicts_without_any_weights(pets: Path, weights_file: Path, tmp_path: Path) -> None:
    made = extract_features(pets, backbone="mobilenet_v3_small", weights=str(weights_file), cache_dir=tmp_path / "c")
    bundled = train_head(made, C=1.0, bundle=True, out="bundled")
    train_head(made, C=1.0, out="plain")
    assert bundled.to_json()["bundled"]
    weights_file.unlink()
    # TORCH_HOME is empty in every test.
    images = predict("bundled", [pets], cache_dir=tmp_path / "none").images
    cached = predict("bundled", made.cache).images
    assert [image.path for image in images] == [image.path for image in cached]
    np.testing.assert_allclose([i.probability for i in images], [i.probability for i in cached], atol=1e-5)
    with pytest.raises(WeightsError, match=r"small\.pth: no such file"):
        predict("plain", [pets], cache_dir=tmp_path / "none")


def test_bundle__of_weights_that_have_moved_or_are_others(pets: Path, weights_file: Path, tmp_path: Path) -> None:
    made = extract_features(pets, backbone="mobilenet_v3_small", weights=str(weights_file), cache_dir=tmp_path / "c")
    moved = weights_file.rename(tmp_path / "moved.pth")
    with pytest.raises(WeightsError, match=r"small\.pth: no such file"):
        train_head(made, C=1.0, bundle=True, out="head")
    with pytest.raises(WeightsError, match="not the expected"):
        train_head(made, C=1.0, bundle=True, weights="random", out="head")
    assert not Path("head").exists()
    train_head(made, C=1.0, bundle=True, weights=str(moved), out="head")
    assert load_model(Path("head")).bundled_tensors


def test_render__shows_what_was_asked(unlabelled: Extraction, noisy: Path) -> None:
    from rich.console import Console

    result = train_head(
        unlabelled,
        labels=noisy,
        C=1e4,
        calibrate=True,
        suspects="s.csv",
        shots="2",
        learning_curve=True,
        seeds=2,
        repeats=2,
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result.render())
    text = capture.get()
    assert result.calibration is not None
    for part in (
        f"ECE {result.reported.ece:.3f}" if result.reported is not None else "",
        f"temperature {result.calibration.temperature:.3g}, fitted on 80 held-out training images; without it log loss",
        f"s.csv: 80 labels, the most suspicious first, {result.suspects.n_issues} of them" if result.suspects else "",
        "images a class",
        "0.0625 (6)",
        "all, by seed",
        "Would more labels help? From 40 to 80 training images accuracy changed by ",
    ):
        assert part
        assert part in text


def test_asked__of_a_cache__imports_neither_torch_nor_scikit_learn(unlabelled: Extraction, noisy: Path) -> None:
    words = ["train-head", str(unlabelled.cache), "--labels", str(noisy), "--calibrate", "--suspects", "s.csv"]
    words += ["--shots", "2", "--learning-curve", "--seeds", "2", "--repeats", "2"]
    code = (
        "import sys\n"
        f"sys.argv = ['tlc', *{words!r}]\n"
        "from transfercache.cli.main import run\n"
        "try:\n  run()\n"
        "finally:\n  print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stderr.splitlines()[-1].split())
    assert {"numpy", "h5py", "transfercache"} <= modules
    assert modules & {"torch", "torchvision", "sklearn", "scipy", "pandas", "PIL"} == set()
    assert "Would more labels help?" in done.stdout
