from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transfercache
from transfercache.backbones.devices import pick_device
from transfercache.backbones.engines import EagerEngine, canary_pixels
from transfercache.backbones.registry import load_backbone
from transfercache.cache.store import Store
from transfercache.commands.extract import Extraction, extract_features
from transfercache.errors import CacheError, DataError, LockedError
from transfercache.images.decode import load_image
from transfercache.images.transforms import eval_pixels


def test_extract_features__equal_the_backbone_row_by_row(extraction: Extraction, pets: Path) -> None:
    backbone = load_backbone("resnet18", weights="random")
    table = extraction.table()
    pixels = [eval_pixels(load_image(pets / path, path), backbone.preprocessing) for path in table.paths]
    expected = EagerEngine(backbone, torch.device("cpu")).embed(np.stack(pixels))
    np.testing.assert_allclose(table.features, expected, rtol=1e-4, atol=1e-5)
    assert table.paths == tuple(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(8))


def test_extract_features__keeps_the_canaries(extraction: Extraction) -> None:
    backbone = load_backbone("resnet18", weights="random")
    expected = EagerEngine(backbone, pick_device("auto")).embed(canary_pixels(224))
    np.testing.assert_allclose(extraction.open().canaries, expected, rtol=1e-4, atol=1e-5)


def test_result__has_the_fields_of_the_command_line(extraction: Extraction) -> None:
    document = json.loads(json.dumps(extraction.to_json()))
    assert list(document) == [
        "cache", "rows", "views", "computed", "reused", "checked", "bad", "straddling",
        "dim", "seconds", "images_per_second", "engine", "device",
    ]  # fmt: skip
    assert (document["rows"], document["computed"], document["dim"], document["engine"]) == (16, 16, 512, "eager")
    assert set(document["seconds"]) == {"hash", "decode", "forward", "write", "total"}
    assert document["images_per_second"] == 16 / document["seconds"]["total"]
    assert document["cache"].endswith(f"pets-resnet18-pooled-{extraction.open().spec.digest()[:8]}")


def test_arrays__are_ready_for_any_estimator(extraction: Extraction) -> None:
    x, y = extraction.arrays("train")
    assert (x.shape, x.dtype, y.dtype) == ((12, 512), np.float32, np.int64)
    assert np.bincount(y).tolist() == [6, 6]
    held_out, labels = extraction.arrays("val")
    assert (held_out.shape, np.bincount(labels).tolist()) == ((4, 512), [2, 2])


def test_second_call__reuses_all_and_records_nothing(extraction: Extraction, pets: Path) -> None:
    before = extraction.open().provenance
    again = extract_features(pets, weights="random", cache_dir=extraction.cache.parent)
    assert (again.cache, again.computed, again.reused) == (extraction.cache, 0, 16)
    assert again.images_per_second is None
    assert [run.computed for run in again.open().provenance if run.computed] == [16]
    assert again.record["seconds"] == before[0].seconds["total"]
    assert (again.record["images"], again.record["is_from_this_run"]) == (16, False)
    assert again.record["is_complete"]
    assert [(run["images"], run["seconds"]) for run in again.record["runs"]] == [(16, again.record["seconds"])]


def test_record__counts_interrupted_runs_and_says_what_it_does_not_know(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, batches = EagerEngine.embed, iter(range(100))

    def interrupted(engine: EagerEngine, pixels: Any) -> Any:
        # The first batch is the canaries.
        if next(batches) == 2:
            raise KeyboardInterrupt
        return embed(engine, pixels)

    def extract(folder: str) -> Extraction:
        return extract_features(pets, weights="random", cache_dir=tmp_path / folder, batch_size=4)

    monkeypatch.setattr(EagerEngine, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract("cache")
    record = extract("cache").record
    assert [run["images"] for run in record["runs"]] == [4, 12]
    assert (record["images"], record["is_complete"], record["is_from_this_run"]) == (16, True, False)
    assert record["seconds"] == sum(run["seconds"] for run in record["runs"])

    batches = iter(range(100))
    # A kill leaves no record at all.
    monkeypatch.setattr(Store, "record", lambda store, *runs: None)
    with pytest.raises(KeyboardInterrupt):
        extract("killed")
    record = extract("killed").record
    assert (record["images"], record["is_complete"]) == (12, False)


def test_labels_and_splits__change_without_computing(extraction: Extraction, pets: Path, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    shutil.copytree(extraction.cache.parent, cache_dir)
    (tmp_path / "fixes.csv").write_text("path,label\ncat/0.png,dog\ncat/1.png,\n")
    relabelled = extract_features(pets, weights="random", cache_dir=cache_dir, labels=tmp_path / "fixes.csv")
    assert (relabelled.computed, relabelled.reused) == (0, 16)
    table = relabelled.table()
    assert table.labels.tolist() == [1, -1, *[0] * 6, *[1] * 8]
    # An overlay moves no row to another split.
    np.testing.assert_array_equal(table.split, extraction.table().split)
    moved = extract_features(pets, weights="random", cache_dir=cache_dir, split_seed=1, val_fraction=0.5)
    assert moved.computed == 0
    assert np.bincount(moved.table().split).tolist() == [0, 8, 8]


def test_other_weights__are_another_cache(extraction: Extraction, pets: Path, tmp_path: Path) -> None:
    state = load_backbone("resnet18", weights="random").network.state_dict()
    torch.save({name: value * 0.5 if value.is_floating_point() else value for name, value in state.items()}, "half.pth")
    other = extract_features(pets, weights="half.pth", cache_dir=extraction.cache.parent)
    assert other.cache != extraction.cache
    assert (other.computed, other.reused) == (16, 0)
    assert other.open().provenance[-1].weights["where"] == str(tmp_path / "half.pth")


def test_same_name__of_another_root__gets_a_folder_of_its_own(
    extraction: Extraction, pets: Path, tmp_path: Path
) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    other = extract_features(tmp_path / "pets", weights="random", cache_dir=extraction.cache.parent)
    assert other.cache.name == f"{extraction.cache.name}-2"
    np.testing.assert_array_equal(other.arrays()[0], extraction.arrays()[0])


def test_csv_in_a_folder_of_its_name__has_a_cache_of_its_own(pets: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pets, tmp_path / "pets")
    (folder / "pets.csv").write_text("path,label\ncat/0.png,cat\ncat/none.png,cat\ndog/1.png,dog\n")
    words = {"backbone": "mobilenet_v3_small", "weights": "random"}
    whole, listed = (extract_features(data, **words) for data in (folder, folder / "pets.csv"))
    assert whole.cache != listed.cache
    # Its rows are those of the folder's cache.
    assert (whole.rows, listed.rows, listed.computed, listed.reused) == (16, 3, 0, 2)
    assert [item.to_json() for item in listed.bad] == [
        {"path": "cat/none.png", "reason": "does not exist (pets.csv, line 3)"}
    ]


def test_cache_dir__from_the_environment(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFERCACHE_DIR", str(tmp_path / "elsewhere"))
    result = extract_features(pets, backbone="mobilenet_v3_small", weights="random")
    assert result.cache.parent == tmp_path / "elsewhere"


def test_on_bad__says_so_unless_that_was_accepted(pets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    (tmp_path / "pets/cat/8.png").write_text("text")
    words = {"backbone": "mobilenet_v3_small", "weights": "random"}
    result = extract_features("pets", **words)
    assert [item.to_json() for item in result.bad] == [
        {"path": "cat/8.png", "reason": "not an image (it starts like text)"}
    ]
    assert caplog.messages == [
        "1 of 17 images are unreadable; all others are done and kept: mend or remove those, or pass --on-bad skip"
    ]
    caplog.clear()
    assert len(extract_features("pets", **words, on_bad="skip").bad) == 1
    assert caplog.messages == []


def test_other_files__are_counted_and_named_once(pets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    for name in ("cat/a.txt", "cat/b.txt", "dog/c.gif", "dog/.d.png", "loose.png"):
        (tmp_path / "pets" / name).touch()
    extract_features("pets", backbone="mobilenet_v3_small", weights="random")
    assert caplog.messages == [
        "left out: cat/a.txt and 1 more (not an image by its extension .txt)",
        "left out: dog/.d.png (hidden)",
        "left out: dog/c.gif (not an image by its extension .gif)",
        "left out: loose.png (beside the class folders)",
    ]


def test_errors__are_those_of_the_tree(tmp_path: Path, extraction: Extraction) -> None:
    with pytest.raises(DataError, match="none: no such folder"):
        extract_features(tmp_path / "none")
    assert issubclass(CacheError, transfercache.TlcError)
    assert issubclass(LockedError, transfercache.TlcError)
    with pytest.raises(transfercache.TlcError, match="unknown split 'vla'"):
        extraction.arrays("vla")
