from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfercache.commands.compare import Comparison, compare
from transfercache.commands.extract import extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.train import train_head
from transfercache.errors import DataError, ResourceError, UsageError

COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}


def write_photos(folder: Path, **per_split: int) -> Path:
    """Write `<split>/<class>/<number>.png`, n of each class, of one colour under noise of their own."""
    for number, (split, n_images) in enumerate(per_split.items()):
        for label, (name, colour) in enumerate(COLOURS.items()):
            (folder / split / name).mkdir(parents=True)
            for index in range(n_images):
                noise = np.random.default_rng([number, label, index]).normal(0, 40, (48, 40, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads wait for each other where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with photos/, 4 of each class to train on and 3 held out; the cache comes to lie beside it."""
    write_photos(tmp_path / "photos", train=4, val=3)
    return tmp_path


def run(folder: Path, **changes: Any) -> Comparison:
    options: dict[str, Any] = {"strategies": "knn,logistic,pixels-knn", "weights": "random"}
    return compare(folder / "photos", **{**options, "cache_dir": folder / "cache", **changes})


def test_compare__document(photos: Path) -> None:
    shown: list[list[str]] = []
    told: list[str] = []
    result = run(
        photos,
        strategies="finetune,logistic,knn",
        epochs=1,
        results=photos / "out" / "results.json",
        on_result=lambda comparison: shown.append([entry.label for entry in comparison.summary.entries]),
        on_estimate=lambda label, seconds: told.append(label),
    )
    assert shown == [["knn"], ["knn", "logistic"], ["knn", "logistic", "finetune"]]
    assert told == ["finetune"]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert json.loads((photos / "out" / "results.json").read_text()) == document
    assert document["schema_version"] == 1
    assert (document["data"], document["split"]) == ("photos", "val")
    assert (document["n_train"], document["n_reported"], document["straddling"]) == (8, 6, 0)
    assert [item["name"] for item in document["strategies"]] == ["knn", "logistic", "finetune"]
    for item in document["strategies"]:
        assert item["n_train"] == 8
        assert item["reported"]["n"] == 6
        assert item["reported"]["per_seed"] == [{"seed": 0, "accuracy": item["reported"]["accuracy"]}]
        assert item["seconds"]["first"] >= item["seconds"]["again"]
        assert item["backbone_passes"] == 14
        assert item["kept"] is False
    assert [(pair["a"], pair["b"]) for pair in document["pairs"]] == [
        ("knn", "logistic"),
        ("knn", "finetune"),
        ("logistic", "finetune"),
    ]
    assert [item["against"] for item in document["break_even"]] == ["finetune", "finetune"]
    assert document["bad"] == document["left_out"] == document["unfinished"] == []
    assert {"machine", "versions", "device"} <= set(document["environment"])
    assert "logistic" in result._repr_html_()


def test_compare__kept_results_and_fresh_ones(photos: Path) -> None:
    first = run(photos)
    again = run(photos)
    fresh = run(photos, fresh=True)

    def kept(comparison: Comparison) -> list[bool]:
        return [item["kept"] for item in comparison.to_json()["strategies"]]

    assert (kept(first), kept(again), kept(fresh)) == ([False] * 3, [True] * 3, [False] * 3)
    assert again.to_json()["pairs"] == first.to_json()["pairs"]
    assert [item["seconds"] for item in again.to_json()["strategies"]] == [
        item["seconds"] for item in first.to_json()["strategies"]
    ]
    assert len(list((photos / "cache" / "results").glob("*.safetensors"))) == 3


def test_compare__partial__kept_results_are_of_the_same_activations(photos: Path) -> None:
    def run_partial(**changes: Any) -> tuple[bool, str]:
        (entry,) = run(photos, **{"strategies": "partial", "epochs": 1, "engine": "eager", **changes}).summary.entries
        return entry.is_kept, entry.first.chosen["cached"]

    layer3 = "layer3 256x14x14"
    assert run_partial() == (False, f"{layer3}, float16, 1 views")
    assert run_partial(storage_dtype="float32") == (False, f"{layer3}, float32, 1 views")
    assert run_partial(views=2) == (False, f"{layer3}, float16, 2 views")
    # The cache keeps its views where none are given.
    assert run_partial() == (True, f"{layer3}, float16, 2 views")


def test_compare__relabelled_rows_are_compared_anew(photos: Path) -> None:
    run(photos, strategies="knn")
    fixes = photos / "fixes.csv"
    fixes.write_text("path,label\ntrain/red/0.png,blue\n")
    (item,) = run(photos, strategies="knn", labels=fixes).to_json()["strategies"]
    assert item["kept"] is False
    assert [row["n_train"] for row in item["reported"]["per_class"]] == [5, 3]


def test_compare__new_image_that_is_no_part_of_it_keeps_the_results(photos: Path) -> None:
    first = run(photos, strategies="knn")
    shutil.copytree(photos / "photos" / "val", photos / "photos" / "test")
    moved = run(photos, strategies="knn")
    assert moved.summary.split == "test"
    assert moved.to_json()["strategies"][0]["kept"] is False
    shutil.rmtree(photos / "photos" / "test")
    again = run(photos, strategies="knn")
    assert again.to_json()["strategies"][0]["kept"] is True
    np.testing.assert_array_equal(again.summary.entries[0].first.row, first.summary.entries[0].first.row)


@pytest.mark.parametrize("strategies", ["knn,pixels-knn", "pixels-knn"])
def test_compare__bad_images_are_out_of_every_strategy(
    photos: Path, strategies: str, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "photos" / "train" / "blue" / "1.png").write_text("plain words")
    (photos / "photos" / "val" / "red" / "2.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        result = run(photos, strategies=strategies)
    assert [(item.path, item.reason) for item in result.bad] == [
        ("train/blue/1.png", "not an image (it starts like text)"),
        ("val/red/2.png", "empty file"),
    ]
    assert result.to_json()["bad"][1] == {"path": "val/red/2.png", "reason": "empty file"}
    assert "2 of 14 images are unreadable" in caplog.text
    for entry in result.summary.entries:
        assert entry.first.n_train == 7
        assert entry.first.row.tolist() == [8, 9, 10, 11, 12]


def test_compare__max_minutes_names_what_it_leaves_out(photos: Path) -> None:
    names = "knn,finetune,tutorial-finetune"
    result = run(photos, strategies=names, max_minutes=0.0)
    assert [entry.label for entry in result.summary.entries] == ["knn"]
    assert {item.label for item in result.summary.left_out} == {"finetune", "tutorial-finetune"}
    assert all(item.estimated_seconds > 0 for item in result.summary.left_out)
    assert result.summary.unfinished == ()
    assert {item["name"] for item in result.to_json()["left_out"]} == {"finetune", "tutorial-finetune"}


def test_compare__straddling_rows_and_rare_classes_are_named(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(photos / "photos" / "train" / "red" / "0.png", photos / "photos" / "val" / "red" / "copy.png")
    with caplog.at_level(logging.WARNING):
        result = run(photos, strategies="knn")
    assert result.summary.straddling == 1
    assert "1 groups or sets of equal images lie on both sides of the given split" in result.summary.warnings
    assert any(line.startswith("class 'blue' has 4 training images, fewer than 5 folds") for line in caplog.messages)


def test_compare__class_that_was_never_trained_on_counts_as_wrong(photos: Path) -> None:
    (photos / "photos" / "train" / "green").mkdir()
    (photos / "photos" / "val" / "green").mkdir()
    Image.new("RGB", (40, 40), (20, 200, 30)).save(photos / "photos" / "val" / "green" / "0.png")
    result = run(photos, strategies="knn,pixels-knn")
    assert any("class 'green' has no training image" in warning for warning in result.summary.warnings)
    for entry in result.summary.entries:
        assert entry.report.n == 7
        assert entry.first.target.tolist() == [0, 0, 0, 1, 2, 2, 2]
        assert not entry.first.is_right[3]
        assert entry.report.per_class[1].recall == 0.0


def test_compare__several_backbones_and_seeds(photos: Path) -> None:
    result = run(
        photos, strategies="logistic,pixels-knn", backbone=["resnet18", "mobilenet_v3_small", "resnet18"], seeds=2
    )
    labels = ["logistic (resnet18)", "logistic (mobilenet_v3_small)", "pixels-knn"]
    assert [entry.label for entry in result.summary.entries] == labels
    assert [[run.seed for run in entry.results] for entry in result.summary.entries] == [[0, 1], [0, 1], [0]]
    assert [item["backbone"] for item in result.to_json()["strategies"]] == ["resnet18", "mobilenet_v3_small", None]
    assert result.summary.backbones == ("resnet18", "mobilenet_v3_small")
    assert sorted(path.name.split("-")[1] for path in (photos / "cache").glob("photos-*")) == [
        "mobilenet_v3_small",
        "resnet18",
    ]


def test_compare__without_a_network_no_weights_are_needed(photos: Path) -> None:
    result = run(photos, strategies="pixels-knn", weights="/nowhere/weights.pth", cache_dir=photos / "new")
    assert result.summary.backbones == ()
    assert [path.name for path in (photos / "new").iterdir()] == ["results"]
    given = ("--weights", "/nowhere/weights.pth", "--cache-dir", str(photos / "new"))
    assert result.next_command == ("tlc", "compare", str(photos / "photos"), *given)


def test_next_command__trains_what_was_most_accurate(photos: Path) -> None:
    command = run(photos).next_command
    (cache,) = (photos / "cache").glob("photos-*")
    assert command == ("tlc", "train-head", str(cache), "--solver", "logistic")


@pytest.mark.parametrize("is_split_given", [True, False])
def test_next_command__same_rows_as_were_compared(photos: Path, is_split_given: bool) -> None:
    data = photos / "photos"
    if not is_split_given:
        shutil.rmtree(data / "val")
        shutil.move(data / "train", photos / "drawn")
        data.rmdir()
        shutil.move(photos / "drawn", data)
    fixes = photos / "fixes.csv"
    fixes.write_text(f"path,label\n{'train/' if is_split_given else ''}red/0.png,blue\n")
    rows = {"labels": fixes, "val_fraction": 0.4, "split_seed": 3}
    words = ("--labels", str(fixes), *(() if is_split_given else ("--val-fraction", "0.4", "--split-seed", "3")))
    compared = run(photos, strategies="logistic", epochs=1, **rows)
    (cache,) = (photos / "cache").glob("photos-*")
    # The cache has the split that was drawn, and the one that the data gives is refused another.
    assert compared.next_command == ("tlc", "train-head", str(cache), "--solver", "logistic", *words[:2])
    trained = train_head(cache, labels=fixes, out=photos / "head.safetensors")
    assert trained.n_train == compared.summary.n_train == (8 if is_split_given else 4)
    finetuned = run(photos, strategies="finetune", epochs=1, **rows).next_command
    start = ("tlc", "finetune", str(data), "--backbone", "resnet18", "--weights", "random")
    assert finetuned == (*start, *words, "--epochs", "1")
    assert run(photos, strategies="pixels-knn", split_seed=3).next_command == (
        "tlc",
        "compare",
        str(data),
        *("--weights", "random", "--cache-dir", str(photos / "cache")),
        *(() if is_split_given else ("--split-seed", "3")),
    )


def test_next_command__without_a_model_names_the_same_networks(photos: Path) -> None:
    names = ["mobilenet_v3_small", "resnet18"]
    given: dict[str, Any] = {"views": 2, "storage_dtype": "float32", "decode": "draft"}
    result = run(photos, strategies="knn", backbone=names, epochs=1, **given)
    assert result.next_command == (
        *("tlc", "compare", str(photos / "photos"), "--backbone", names[0], "--backbone", names[1]),
        *("--weights", "random", "--views", "2", "--decode", "draft"),
        *("--cache-dir", str(photos / "cache"), "--storage-dtype", "float32", "--epochs", "1"),
    )


def test_compare__straddling_rows_are_counted_once_and_alike(photos: Path) -> None:
    # Among them rows that are labelled but not compared: those of val, where there is a test split.
    shutil.copytree(photos / "photos" / "val", photos / "photos" / "test")
    shutil.copy(photos / "photos" / "train" / "red" / "0.png", photos / "photos" / "val" / "red" / "copy.png")
    result = run(photos, strategies="pixels-knn")
    assert result.to_json()["straddling"] == 7
    (warning,) = (line for line in result.summary.warnings if "lie on both sides" in line)
    assert warning.startswith("7 groups")
    assert result._repr_html_().count("lie on both sides") == 1


def test_straddling__every_command_counts_good_labelled_rows_alone(photos: Path) -> None:
    pixels = photos / "photos"
    for name in ("test/red", "test/blue"):
        (pixels / name).mkdir(parents=True)
        shutil.copy(pixels / "val" / name[5:] / "0.png", pixels / name / "0.png")
        shutil.copy(pixels / "val" / name[5:] / "1.png", pixels / name / "1.png")
    for name in ("train/red/1.png", "test/red/0.png"):
        (pixels / name).write_text("the same words, and no image")
    lines = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in sorted(pixels.rglob("*.png"))]
    shutil.copy(pixels / "train" / "red" / "0.png", photos / "unlabelled.png")
    data = photos / "rows.csv"
    data.write_text("\n".join(["path,label,split", *lines, f"{photos}/unlabelled.png,,val"]))
    given: dict[str, Any] = {"weights": "random", "on_bad": "skip"}
    extraction = extract_features(data, **given, cache_dir=photos / "cache")
    counts = {
        "extract-features": extraction.straddling,
        "train-head": train_head(extraction, C=1.0, out=photos / "head.safetensors").straddling,
        "finetune": finetune(data, **given, epochs=1, out=photos / "finetuned.safetensors").straddling,
        "compare": compare(data, strategies="knn", **given, cache_dir=photos / "cache").summary.straddling,
    }
    # Of four sets that val and test share, three have no bad image; those of bad images, and of one without a label,
    # flatter nobody.
    assert counts == dict.fromkeys(counts, 3)


def test_as_demo__document_title_and_next_command(photos: Path) -> None:
    what = {"data": "digits", "backbone": "efficientnet_lite0", "why": "no network"}
    result = run(photos, strategies="pixels-knn").as_demo(what, note="in place of others")
    assert result.to_json()["demo"] == what
    assert "(in place of others)" in result._repr_html_()
    assert result.next_command == ("tlc", "compare", "my_photos/", "--backbone", "efficientnet_lite0")
    assert "demo" not in run(photos, strategies="pixels-knn").to_json()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strategies": "knn,fintune"}, UsageError, "unknown strategy 'fintune' .did you mean finetune"),
        ({"backbone": "resnet19"}, UsageError, "unknown backbone 'resnet19' .did you mean"),
        ({"seeds": 0}, UsageError, "--seeds 0: must be at least 1"),
        ({"epochs": 0}, UsageError, "--epochs 0: must be at least 1"),
        ({"max_minutes": -1}, UsageError, "--max-minutes -1: must be a number that is not negative"),
        ({"max_minutes": float("nan")}, UsageError, "--max-minutes nan: must be a number"),
        ({"workers": 0}, UsageError, "--workers 0: must be at least 1"),
        ({"on_bad": "foo"}, UsageError, "--on-bad 'foo' is none of fail, skip"),
        ({"backbone": []}, UsageError, "--backbone: name at least one"),
    ],
)
def test_compare__words_that_are_off(
    photos: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(photos, **changes)


def test_compare__results_that_cannot_be_written__are_refused_before_anything_runs(photos: Path) -> None:
    (photos / "file").touch()
    for path, why in ((photos, "Is a directory"), (photos / "file" / "results.json", "Not a directory|File exists")):
        with pytest.raises(ResourceError, match=rf"cannot be written \(({why})\); choose another path"):
            run(photos, strategies="pixels-knn", results=path)
    assert not (photos / "cache").exists()


def test_compare__cache_folder_that_cannot_be_written__is_refused_before_anything_trains(photos: Path) -> None:
    (photos / "cache").touch()
    told: list[str] = []
    with pytest.raises(ResourceError, match=r"cache/results/.*: cannot be written \(.*\); choose another path"):
        run(photos, strategies="finetune", epochs=1, on_estimate=lambda label, seconds: told.append(label))
    assert told == []


def test_compare__nothing_is_held_out(photos: Path) -> None:
    folder = photos / "photos" / "train"
    with pytest.raises(DataError, match="no labelled image is held out"):
        compare(folder, strategies="pixels-knn", val_fraction=0.0, cache_dir=photos / "cache")


def test_compare__one_class_alone(photos: Path) -> None:
    shutil.rmtree(photos / "photos" / "train" / "red")
    with pytest.raises(DataError, match="fewer than two classes with training images"):
        run(photos, strategies="pixels-knn")
