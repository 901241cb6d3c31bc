from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.backbones.engines import EagerEngine
from transfercache.cache.reader import open_cache
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.finetune_result import FinetuneOutcome
from transfercache.commands.head_result import HeadResult
from transfercache.commands.inputs import finish_manifest
from transfercache.commands.predict import load, predict
from transfercache.commands.predictions import Prediction
from transfercache.commands.train import train_head
from transfercache.errors import CacheError, ModelError, ResourceError, UsageError, WeightsError
from transfercache.images.decode import decode_image
from transfercache.images.sources import read_source
from transfercache.images.transforms import eval_pixels
from transfercache.metrics import softmax
from transfercache.models.head_file import load_model, save_model
from transfercache.splits import Split
from transfercache.stopwatch import Stopwatch


@pytest.fixture(scope="session")
def head(unlabelled: Extraction, flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on the first 40 images of `flat`, which were extracted before anyone labelled them."""
    folder = tmp_path_factory.mktemp("models")
    rows = "".join(f"{path.name},{path.stem[4:]}\n" for path in sorted(flat.iterdir())[:40])
    (folder / "fixes.csv").write_text("path,label\n" + rows)
    train_head(unlabelled, labels=folder / "fixes.csv", C=1.0, out=folder / "head.safetensors")
    return folder / "head.safetensors"


@pytest.fixture(scope="session")
def finetuned(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOutcome:
    out = tmp_path_factory.mktemp("models") / "finetuned.safetensors"
    return finetune(pets, backbone="mobilenet_v3_small", weights="random", epochs=1, batch_size=12, out=out)


def test_predict__of_a_cache__equals_that_of_the_files(
    head: Path, unlabelled: Extraction, flat: Path, tmp_path: Path
) -> None:
    cached = predict(head, unlabelled.cache).images
    files = predict(head, [flat], cache_dir=tmp_path / "no-cache").images
    assert len(cached) == 100
    assert [image.path for image in cached] == [image.path for image in files]
    assert [image.label for image in cached] == [image.label for image in files]
    np.testing.assert_allclose(
        [image.probability for image in cached], [image.probability for image in files], atol=1e-5
    )
    assert {image.label for image in cached} == {"cat", "dog"}


def test_predict__of_a_cache__needs_neither_torch_nor_the_images(
    head: Path, unlabelled: Extraction, flat: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['tlc', 'predict', {str(head)!r}, {str(unlabelled.cache)!r}, '--json']\n"
        "from transfercache.cli.main import run\n"
        "try:\n  run()\n"
        "finally:\n  print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "torchvision", "timm", "sklearn"} & set(done.stderr.splitlines()[-1].split()) == set()
    images = json.loads(done.stdout)
    expected = [image.to_json() for image in predict(head, unlabelled.cache).images]
    assert images == expected
    # Two classes: both are in `top`, and the probabilities are of one distribution.
    assert all(abs(sum(item["probability"] for item in image["top"]) - 1) < 1e-9 for image in images)


def test_predict__of_data_whose_rows_are_cached__loads_no_backbone(
    head: Path, unlabelled: Extraction, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr("transfercache.models.network.load_backbone_of", refuse)
    result = predict(head, flat, cache_dir=unlabelled.cache.parent)
    assert [image.to_json() for image in result.images] == [
        image.to_json() for image in predict(head, unlabelled.cache).images
    ]


def test_predict__of_data_that_has_changed__computes_only_what_is_new(
    head: Path, flat: Path, draw_photos: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(flat.iterdir())[:20]:
        shutil.copy(path, data)
    extract_features(data, backbone="mobilenet_v3_small", weights="random", cache_dir=tmp_path / "cache")
    (data / "005-dog.png").unlink()
    shutil.copy(data / "000-cat.png", data / "000-cat-copy.png")
    draw_photos(data, ["00-cat.png", "new-dog.png"], first_seed=1000)
    model = load(head)
    engine, seen = model.engine, []
    embed = engine.embed
    engine.embed = lambda pixels: seen.append(len(pixels)) or embed(pixels)
    result = model.predict(data, cache_dir=tmp_path / "cache")
    # 00-cat.png and new-dog.png in one batch; the copy's bytes are known.
    assert seen == [2]
    assert len(result.images) == 22
    by_path = {image.path: image for image in result.images}
    assert by_path["000-cat-copy.png"].probability == by_path["000-cat.png"].probability


def test_predict__of_single_files__keeps_their_order(head: Path, flat: Path) -> None:
    paths = [flat / "051-dog.png", flat / "050-cat.png"]
    result = predict(head, paths, top=1)
    assert [image.path for image in result.images] == [str(path) for path in paths]
    assert [len(image.top) for image in result.images] == [1, 1]
    alone = predict(head, paths[1]).images[0]
    assert alone.probability == pytest.approx(result.images[1].probability, abs=1e-6)
    assert [label for label, _ in alone.top] == sorted(("cat", "dog"), key=lambda label: -dict(alone.top)[label])


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_out__has_every_image_in_order(head: Path, unlabelled: Extraction, tmp_path: Path, ending: str) -> None:
    every = predict(head, unlabelled.cache).images
    result = predict(head, unlabelled.cache, out=tmp_path / f"all.{ending}")
    assert result.to_json() == {"out": str(tmp_path / f"all.{ending}"), "images": 100, "bad": []}
    text = (tmp_path / f"all.{ending}").read_text()
    if ending == "jsonl":
        assert [json.loads(line) for line in text.splitlines()] == [image.to_json() for image in every]
    else:
        rows = list(csv.DictReader(text.splitlines()))
        assert [(row["path"], row["label"], float(row["probability"])) for row in rows] == [
            (image.path, image.label, image.probability) for image in every
        ]


def test_out__csv_has_as_many_classes_as_top_asks_for(head: Path, unlabelled: Extraction, tmp_path: Path) -> None:
    headers = {}
    for top in (1, 2, 5):
        result = predict(head, unlabelled.cache, top=top, out=tmp_path / "all.csv")
        lines = (tmp_path / "all.csv").read_text().splitlines()
        headers[top] = lines[0]
    assert headers[1] == "path,label,probability,reason"
    assert headers[2] == headers[5] == "path,label,probability,reason,label_2,probability_2"
    (_, second) = result.images[0].top
    row = next(csv.DictReader(lines))
    assert (row["label_2"], float(row["probability_2"]), row["reason"]) == (*second, "")


def test_out__of_a_run_that_fails__stays_what_it_was(
    head: Path, unlabelled: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "all.csv"
    out.parent.mkdir()
    out.write_text("precious")
    model = load(head)
    rows = model._cache_rows

    def interrupted(folder: Path, n_views: int) -> object:
        yield next(rows(folder, n_views=n_views))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "_cache_rows", lambda _, folder, n_views: interrupted(folder, n_views))
    with pytest.raises(KeyboardInterrupt):
        model.predict(unlabelled.cache, out=out)
    assert [path.read_text() for path in out.parent.iterdir()] == ["precious"]
    with pytest.raises(ResourceError, match=r"folder\.csv: cannot be written \(Is a directory\)"):
        predict(head, unlabelled.cache, out=_made(tmp_path / "folder.csv"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_predict__of_a_folder__takes_every_image_below_and_finds_its_cache(
    head: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos = [path.name for path in sorted(flat.iterdir())[:4]]
    for name, folder in zip(photos, ("photos", "photos/early", "photos/late/deep", "photos/early"), strict=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(flat / name, tmp_path / folder)
    extract_features("photos", backbone="mobilenet_v3_small", weights="random")  # of class folders: three of the four
    (tmp_path / "photos/notes.txt").touch()
    caplog.clear()
    model = load(head)
    engine, seen = model.engine, []
    embed = engine.embed
    monkeypatch.setattr(engine, "embed", lambda pixels: seen.append(len(pixels)) or embed(pixels))
    result = model.predict("photos")
    assert [image.path for image in result.images] == [
        photos[0],
        f"early/{photos[1]}",
        f"early/{photos[3]}",
        f"late/deep/{photos[2]}",
    ]
    assert seen == [1]
    assert caplog.messages == ["left out: notes.txt (not an image by its extension .txt)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"top": 0}, "--top 0: must be at least 1"),
        ({"top": -1}, "--top -1: must be at least 1"),
        ({"batch_size": -1}, "--batch-size -1: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"on_bad": "foo"}, "--on-bad 'foo' is none of fail, skip"),
        ({"inputs": []}, r"inputs \[\]: nothing to predict; give images, folders, DATA or a CACHE"),
    ],
)
def test_predict__options_that_are_off(head: Path, unlabelled: Extraction, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        predict(head, **{"inputs": unlabelled.cache, **words})


def test_next_command__names_the_same_inputs(head: Path, unlabelled: Extraction, flat: Path, tmp_path: Path) -> None:
    start = ("tlc", "predict", str(head), str(unlabelled.cache))
    assert predict(head, unlabelled.cache).next_command == (*start, "--out", "predictions.csv")
    result = predict(head, unlabelled.cache, out=tmp_path / "all.csv")
    assert result.next_command == (*start, "--out", str(tmp_path / "all.jsonl"))
    many = predict(head, sorted(flat.iterdir())[:4])
    assert many.next_command == ("tlc", "predict", str(head), str(flat), "--out", "predictions.csv")
    shutil.copytree(flat, tmp_path / "more" / "below")
    files = [path for folder in (flat, tmp_path / "more" / "below") for path in sorted(folder.iterdir())[:2]]
    both = predict(head, [*files, tmp_path / "more"], top=1, cache_dir=tmp_path / "c2").next_command
    folders = (str(flat), str(tmp_path / "more" / "below"), str(tmp_path / "more"))
    options = ("--top", "1", "--cache-dir", str(tmp_path / "c2"))
    assert both == ("tlc", "predict", str(head), *folders, *options, "--out", "predictions.csv")


def test_predict__of_a_cache_with_a_model_of_other_weights(head: Path, extraction: Extraction) -> None:
    with pytest.raises(
        CacheError, match=r"not of the spec that .*head\.safetensors was trained on \(backbone resnet18"
    ):
        predict(head, extraction.cache)


def test_finetuned_model__predicts_what_its_run_reported(finetuned: FinetuneOutcome, pets: Path) -> None:
    assert finetuned.reported is not None
    images = predict(finetuned.model, pets).images
    saved = load(finetuned.model)
    assert saved.model.reported == finetuned.reported.to_json()
    # The confusion matrix and the log loss of the run, from the predictions of the saved model.
    split = _split_of(pets)
    held_out = [image for image in images if split[image.path] == "val"]
    truth = [image.path.split("/")[0] for image in held_out]
    right = np.mean([image.label == name for image, name in zip(held_out, truth, strict=True)])
    loss = -np.mean([np.log(dict(image.top)[name]) for image, name in zip(held_out, truth, strict=True)])
    assert len(held_out) == finetuned.reported.n == 4
    assert right == finetuned.reported.accuracy
    assert loss == pytest.approx(finetuned.reported.log_loss, abs=1e-5)


def test_finetuned_model__takes_no_cache(finetuned: FinetuneOutcome, unlabelled: Extraction) -> None:
    with pytest.raises(CacheError, match="is fine-tuned and has a backbone of its own; give it the images"):
        predict(finetuned.model, unlabelled.cache)


def test_load__of_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        load(tmp_path / "none")


def test_weights__that_are_not_those_of_the_head(head: Path, flat: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth: no such file"):
        predict(head, flat / "000-cat.png", weights="none.pth")


def _split_of(pets: Path) -> dict[str, str]:
    manifest = finish_manifest(
        read_source(pets), labels=None, val_fraction=0.2, split_seed=0, known={}, watch=Stopwatch()
    )
    return {path: Split(split).name.lower() for path, split in zip(manifest.paths, manifest.split, strict=True)}


def test_predict__rows_of_other_versions__are_computed_where_they_do_not_agree(
    extraction: Extraction, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    head = train_head(extraction, C=1.0, out=tmp_path / "head").head
    expected = predict(head, [pets], engine="eager", cache_dir=extraction.cache.parent).images
    monkeypatch.setattr("transfercache.commands.predict.installed_versions", lambda: {"torch": "99"})
    assert predict(head, [pets], engine="eager", cache_dir=extraction.cache.parent).images == expected
    assert caplog.messages == []
    embed = EagerEngine.embed

    def embed_otherwise(engine: EagerEngine, pixels: np.ndarray) -> np.ndarray:
        features = embed(engine, pixels)
        # The four canaries, which are checked as well, are let through.
        return features if len(pixels) == 4 else features[:, ::-1].copy()

    monkeypatch.setattr(EagerEngine, "embed", embed_otherwise)
    turned = predict(head, [pets], engine="eager", cache_dir=extraction.cache.parent).images
    assert [image.probability for image in turned] != [image.probability for image in expected]
    (message,) = caplog.messages
    assert message.startswith(
        f"computed instead of taken from there: {extraction.cache}: made by engine {extraction.engine}, "
    )


@pytest.fixture(scope="session")
def mirrored(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HeadResult]:
    """The cache of `pets` in two views, and what train-head --tta said of its head; never to be changed."""
    folder = tmp_path_factory.mktemp("mirrored")
    extraction = extract_features(
        pets, backbone="mobilenet_v3_small", weights="random", views=2, engine="eager", cache_dir=folder / "cache"
    )
    return extraction.cache, train_head(extraction, C=1.0, tta=True, calibrate=True, out=folder / "head.safetensors")


def _probabilities(images: Sequence[Prediction], class_names: Sequence[str]) -> np.ndarray:
    return np.array([[dict(image.top)[name] for name in class_names] for image in images])


def test_tta__of_a_cache__is_what_train_head_reported(mirrored: tuple[Path, HeadResult], pets: Path) -> None:
    cache, trained = mirrored
    assert trained.head is not None
    assert trained.reported is not None
    result = predict(trained.head, cache, tta=True)
    head, table = load(trained.head).model.head, open_cache(cache).table()
    by_view = head.probabilities(table.features).reshape(16, 2, 2)
    found = _probabilities(result.images, head.class_names)
    np.testing.assert_allclose(found, by_view.mean(axis=1), atol=1e-7)
    plain = predict(trained.head, cache)
    np.testing.assert_allclose(_probabilities(plain.images, head.class_names), by_view[:, 0], atol=1e-7)
    assert np.abs(by_view[:, 0] - by_view.mean(axis=1)).max() > 1e-5
    # The figures of train-head --tta, from these predictions.
    split = _split_of(pets)
    rows = [i for i, image in enumerate(result.images) if split[image.path] == trained.reported.split]
    truth = [head.class_names.index(result.images[i].path.split("/")[0]) for i in rows]
    assert len(rows) == trained.reported.n
    assert -np.mean(np.log(found[rows, truth])) == pytest.approx(trained.reported.log_loss, rel=1e-6)
    assert result.next_command[-3:] == ("--tta", "--out", "predictions.csv")


def test_tta__of_files__equals_that_of_their_cache(
    mirrored: tuple[Path, HeadResult], pets: Path, tmp_path: Path
) -> None:
    cache, trained = mirrored
    assert trained.head is not None
    names = load(trained.head).class_names
    expected = _probabilities(predict(trained.head, cache, tta=True).images, names)
    # Batches of 5 views part some images from their mirror images.
    fresh = predict(trained.head, [pets], tta=True, engine="eager", batch_size=5, cache_dir=tmp_path / "none")
    np.testing.assert_allclose(_probabilities(fresh.images, names), expected, atol=1e-6)


def test_tta__computes_only_the_views_that_no_cache_holds(
    mirrored: tuple[Path, HeadResult], pets: Path, tmp_path: Path
) -> None:
    cache, trained = mirrored
    assert trained.head is not None
    extract_features(
        pets, backbone="mobilenet_v3_small", weights="random", engine="eager", cache_dir=tmp_path / "one-view"
    )
    computed = {}
    for cache_dir in (cache.parent, tmp_path / "one-view", tmp_path / "none"):
        model = load(trained.head, engine="eager")
        engine, seen = model.engine, []
        embed = engine.embed
        engine.embed = lambda pixels, seen=seen, embed=embed: seen.append(len(pixels)) or embed(pixels)
        result = model.predict([pets], tta=True, cache_dir=cache_dir, batch_size=8)
        computed[cache_dir.name] = (sum(seen), [image.label for image in result.images])
    labels = [image.label for image in predict(trained.head, cache, tta=True).images]
    assert computed == {
        cache.parent.name: (0, labels),
        "one-view": (16, labels),
        "none": (32, labels),
    }


def test_tta__of_a_fine_tuned_model__is_the_mean_of_the_image_and_its_mirror_image(pets: Path, tmp_path: Path) -> None:
    # A ResNet: a random network of the smaller kind gives one embedding to all images.
    path = finetune(pets, weights="random", epochs=1, batch_size=12, out=tmp_path / "model.safetensors").model
    model = load(path, engine="eager")
    head, photo = model.model.head, pets / "dog" / "1.png"
    pixels = eval_pixels(decode_image(photo.read_bytes(), photo.name), head.spec.preprocessing)
    both = head.probabilities(model.engine.embed(np.stack([pixels, pixels[:, ::-1]])))
    assert np.abs(both[0] - both[1]).max() > 1e-4
    (image,) = model.predict(photo, tta=True).images
    np.testing.assert_allclose(_probabilities([image], head.class_names)[0], both.mean(axis=0), atol=1e-6)


def test_tta__of_a_cache_with_one_view__says_what_to_do(head: Path, unlabelled: Extraction) -> None:
    with pytest.raises(UsageError, match=r"--tta: .* has one view an image; run its extract-features with --views 2, "):
        predict(head, unlabelled.cache, tta=True)


def test_tta__of_unreadable_images__names_each_once(
    head: Path, draw_photos: Callable[..., Path], tmp_path: Path
) -> None:
    data = draw_photos(tmp_path / "data", ["a.png", "c.png", "d.png"])
    (data / "b.png").write_text("text")
    result = predict(head, data, tta=True, batch_size=3, cache_dir=tmp_path / "none")
    assert [(image.path, image.reason) for image in result.images] == [
        ("a.png", None),
        ("b.png", "not an image (it starts like text)"),
        ("c.png", None),
        ("d.png", None),
    ]


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tta__image_that_has_no_embedding_in_one_view__is_bad(
    head: Path, draw_photos: Callable[..., Path], tmp_path: Path, batch_size: int, view: int
) -> None:
    data = draw_photos(tmp_path / "data", ["a.png", "b.png"])
    model = load(head)
    engine = model.engine
    embed, n_done = engine.embed, 0

    def embed_badly(pixels: np.ndarray) -> np.ndarray:
        nonlocal n_done
        features = embed(pixels).copy()
        at = 2 + view - n_done  # of b.png
        if 0 <= at < len(features):
            features[at] = np.nan
        n_done += len(features)
        return features

    engine.embed = embed_badly
    good, bad = model.predict(data, tta=True, batch_size=batch_size, cache_dir=tmp_path / "none").images
    assert good.reason is None
    assert (bad.label, bad.reason) == (None, "its embedding is not finite (NaN or infinity); are the weights damaged?")


def test_predict__of_a_calibrated_head__divides_by_its_temperature(
    mirrored: tuple[Path, HeadResult], tmp_path: Path
) -> None:
    cache, trained = mirrored
    assert trained.head is not None
    model = load_model(trained.head)
    save_model(replace(model, head=replace(model.head, temperature=7.5)), tmp_path / "soft.safetensors")
    found = _probabilities(predict(tmp_path / "soft.safetensors", cache).images, model.head.class_names)
    features = open_cache(cache).table().features[::2]
    np.testing.assert_allclose(found, softmax(model.head.logits(features) / 7.5), atol=1e-7)
    assert np.abs(found - softmax(model.head.logits(features))).max() > 0.01
