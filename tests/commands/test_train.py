from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from transfercache.commands.cached_rows import labelled_table
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.train import train_head
from transfercache.errors import DataError, UsageError
from transfercache.heads.fit import fit_head
from transfercache.models.head_file import load_model


def test_train_head__reports_and_saves_the_same_head(extraction: Extraction, tmp_path: Path) -> None:
    result = train_head(extraction)
    assert result.head == Path("models/pets-logistic.safetensors")
    assert (result.solver, result.n_train) == ("logistic", 12)
    table = extraction.table("val")
    assert result.reported is not None
    assert (result.reported.split, result.reported.n) == ("val", 4)
    assert result.reported.accuracy == np.mean(result.predict(table.features) == table.labels)
    saved = load_model(tmp_path / result.head)
    np.testing.assert_array_equal(saved.head.predict(table.features), result.predict(table.features))
    np.testing.assert_allclose(saved.canary_logits, saved.head.logits(extraction.open().canaries))
    assert saved.head.chosen == result.chosen
    assert saved.weights_source["kind"] == "random"
    assert saved.reported == result.reported.to_json()


def test_train_head__of_a_path__is_that_of_the_extraction(extraction: Extraction) -> None:
    results = [train_head(cache, C=1.0, out=Path("head")) for cache in (extraction, extraction.cache)]
    heads = [result.linear_head for result in results]
    assert heads[0] is not None
    assert heads[1] is not None
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)


def test_train_head__has_the_fields_of_the_command_line(extraction: Extraction) -> None:
    document = json.loads(json.dumps(train_head(extraction).to_json(), allow_nan=False))
    assert list(document) == [
        "head", "solver", "chosen", "n_train", "views", "tta", "bundled", "straddling", "reported", "calibration",
        "suspects", "shots", "learning_curve", "more_labels", "seeds", "seconds",
    ]  # fmt: skip
    assert set(document["seconds"]) == {"load", "fit", "total"}
    assert {"split", "accuracy", "interval", "n", "balanced_accuracy", "macro_f1", "log_loss", "per_class"} <= set(
        document["reported"]
    )


def test_train_head__is_repeatable(extraction: Extraction, tmp_path: Path) -> None:
    for name in "ab":
        train_head(extraction, out=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views__all_train_and_view_0_or_their_mean_is_reported(pets: Path, tmp_path: Path) -> None:
    extraction = extract_features(pets, weights="random", views=3, cache_dir=tmp_path / "cache")
    result = train_head(extraction, C=1.0, out=tmp_path / "head")
    averaged = train_head(extraction, C=1.0, out=tmp_path / "other", tta=True)
    assert (result.n_train, result.views, result.tta, averaged.tta) == (12, 3, False, True)
    assert (tmp_path / "head").read_bytes() != (tmp_path / "other").read_bytes()  # their figures are kept beside them
    head = load_model(tmp_path / "head").head
    np.testing.assert_array_equal(head.weight, load_model(tmp_path / "other").head.weight)
    table = extraction.table()
    train = table.subset((table.split == 1) & (table.labels >= 0))
    assert len(train) == 36
    np.testing.assert_array_equal(head.weight, fit_head(train, C=1.0).weight)
    val = table.subset(table.split == 2)
    probabilities = head.probabilities(val.features).reshape(4, 3, 2)
    for reported, expected in ((result.reported, probabilities[:, 0]), (averaged.reported, probabilities.mean(axis=1))):
        assert reported is not None
        assert reported.n == 4
        of_labels = expected[np.arange(4), val.labels[::3]]
        assert reported.log_loss == pytest.approx(-np.log(of_labels).mean())
        assert [item.n_train for item in reported.per_class] == [6, 6]


def test_knn__takes_each_image_once(pets: Path, tmp_path: Path) -> None:
    words = {"weights": "random", "cache_dir": tmp_path / "cache"}
    one = train_head(extract_features(pets, **words), solver="knn")
    three = train_head(extract_features(pets, **words, views=3), solver="knn")
    assert (three.views, three.n_train) == (1, 12)
    assert one.reported is not None
    assert three.reported is not None
    assert three.reported.to_json() == one.reported.to_json()


def test_tta__of_one_view__is_refused(extraction: Extraction) -> None:
    with pytest.raises(UsageError, match=r"--tta: .* has one view an image; run its extract-features with --views"):
        train_head(extraction, tta=True)


def test_knn__evaluates_and_leaves_no_head(extraction: Extraction, tmp_path: Path) -> None:
    result = train_head(extraction, solver="knn")
    assert (result.head, result.chosen) == (None, {"neighbours": 5})
    assert result.reported is not None
    assert result.reported.n == 4
    assert result.next_command == ("tlc", "train-head", str(extraction.cache), "--solver", "logistic")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="knn only evaluates and leaves no head"):
        result.predict(np.zeros((1, 512), np.float32))


def test_labels__leave_the_cache_as_it_is(extraction: Extraction, tmp_path: Path) -> None:
    before = (extraction.cache / "catalogue.json").read_bytes()
    (tmp_path / "fixes.csv").write_text("path,label\ncat/0.png,dog\n")
    result = train_head(extraction, labels=tmp_path / "fixes.csv", C=1.0)
    assert result.reported is not None
    n = {item.name: item.n + item.n_train for item in result.reported.per_class}
    assert n == {"cat": 7, "dog": 9}
    assert (extraction.cache / "catalogue.json").read_bytes() == before


def test_labels__of_an_unlabelled_cache__split_as_extraction_does(
    unlabelled: Extraction, flat: Path, tmp_path: Path
) -> None:
    fixes = tmp_path / "fixes.csv"
    fixes.write_text("path,label\n" + "".join(f"{p.name},{p.stem[4:]}\n" for p in sorted(flat.iterdir())[:40]))
    with pytest.raises(DataError, match=r"fewer than two classes with training images \(none has any\)"):
        train_head(unlabelled)
    table = labelled_table(unlabelled.open(), labels=fixes, val_fraction=None, split_seed=None)
    assert table.class_names == ("cat", "dog")
    assert np.bincount(table.labels + 1).tolist() == [60, 20, 20]
    assert np.bincount(table.split).tolist() == [60, 32, 8]
    shutil.copytree(unlabelled.cache.parent, tmp_path / "cache")
    relabelled = extract_features(
        flat, backbone="mobilenet_v3_small", weights="random", cache_dir=tmp_path / "cache", labels=fixes
    )
    assert relabelled.computed == 0
    np.testing.assert_array_equal(relabelled.table().split, table.split)
    np.testing.assert_array_equal(relabelled.table().labels, table.labels)


def test_labels__with_bad_images__split_as_extraction_does(flat: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for path in sorted(flat.iterdir())[:20]:
        shutil.copy(path, folder)
    for name in ("000-cat.png", "001-dog.png", "003-dog.png"):
        (folder / name).write_text(f"{name} is text")
    (folder / "002-cat.png").unlink()
    (folder / "002-cat.png").symlink_to("nowhere")
    fixes = tmp_path / "fixes.csv"
    fixes.write_text("path,label\n" + "".join(f"{p.name},{p.stem[4:]}\n" for p in sorted(folder.iterdir())))
    words = {"backbone": "mobilenet_v3_small", "weights": "random", "on_bad": "skip"}
    plain = extract_features(folder, **words)
    table = labelled_table(plain.open(), labels=fixes, val_fraction=None, split_seed=None)
    relabelled = extract_features(folder, **words, labels=fixes).table()
    np.testing.assert_array_equal(relabelled.split, table.split)
    np.testing.assert_array_equal(relabelled.labels, table.labels)


def test_split_seed_and_val_fraction__draw_the_split_that_extraction_draws(
    extraction: Extraction, pets: Path, tmp_path: Path
) -> None:
    shutil.copytree(extraction.cache.parent, tmp_path / "cache")
    for words in ({"split_seed": 3}, {"val_fraction": 0.5}, {"split_seed": 1, "val_fraction": 0.25}):
        again = extract_features(pets, weights="random", cache_dir=tmp_path / "cache", **words)
        drawn = labelled_table(extraction.open(), labels=None, **{"split_seed": None, "val_fraction": None, **words})
        assert again.computed == 0
        np.testing.assert_array_equal(drawn.split, again.table().split)
    result = train_head(extraction, val_fraction=0.5, C=1.0)
    assert result.reported is not None
    assert (result.n_train, result.reported.n) == (8, 8)


@pytest.mark.parametrize("val_fraction", [1.5, 1.0, -0.1, float("nan")])
def test_val_fraction__that_is_no_share(
    extraction: Extraction, pets: Path, tmp_path: Path, val_fraction: float
) -> None:
    for command in (
        lambda: train_head(extraction, val_fraction=val_fraction),
        lambda: extract_features(pets, weights="random", val_fraction=val_fraction, cache_dir=tmp_path / "cache"),
    ):
        with pytest.raises(UsageError, match=rf"^--val-fraction {val_fraction} must be at least 0 and below 1, for ex"):
            command()
    assert list(tmp_path.iterdir()) == []


def test_labels__of_data_that_gives_its_split__leave_new_rows_in_none(pets: Path, flat: Path, tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        lines += [f"{pets}/{name}/{i}.png,{name},{split}" for name in ("cat", "dog") for i in numbers]
    lines += [f"{flat}/{path.name},," for path in sorted(flat.iterdir())[:4]]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    cache = extract_features(tmp_path / "rows.csv", backbone="mobilenet_v3_small", weights="random").open()
    assert cache.catalogue.has_given_split
    (tmp_path / "fixes.csv").write_text("path,label\n" + "".join(f"{path},cat\n" for path in cache.rows.path[-4:]))
    table = labelled_table(cache, labels=tmp_path / "fixes.csv", val_fraction=None, split_seed=None)
    assert table.labels[-4:].tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(table.split, cache.rows.split)
    assert table.split[-4:].tolist() == [0, 0, 0, 0]


def test_data_whose_labels_were_edited__says_that_the_caches_are_used(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{path},{path.parent.name}" for path in sorted(pets.rglob("*.png"))]
    csv_path = tmp_path / "rows.csv"
    csv_path.write_text("\n".join(["path,label", *rows]))
    extract_features(csv_path, weights="random", cache_dir="cache")
    csv_path.write_text("\n".join(["path,label", *rows[:-1], rows[-1].replace(",dog", ",cat")]))
    with caplog.at_level(logging.WARNING):
        train_head(csv_path, weights="random", cache_dir="cache", C=1.0)
    assert [line for line in caplog.messages if "labels are not those" in line] == [
        f"{csv_path}: 1 labels are not those of its cache, which are used (bring them over with: tlc extract-features "
        f"{csv_path} --backbone resnet18 --weights random --cache-dir cache)"
    ]
