from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import transfercache
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.choice import choose_engine
from transfercache.backbones.devices import pick_device
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import load_backbone
from transfercache.cache.store import Store, find_or_create
from transfercache.commands import extract as extract_module
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.inputs import EmbedOptions, known_files
from transfercache.commands.train import train_head
from transfercache.environment import describe_environment
from transfercache.errors import CacheError, DataError, LockedError, UsageError
from transfercache.files import sha256_file
from transfercache.images import manifest as manifest_module
from transfercache.images.decode import load_image
from transfercache.images.transforms import eval_pixels, view_pixels


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
        "dim", "seconds", "images_per_second", "engine", "compute", "device",
    ]  # fmt: skip
    assert (document["rows"], document["computed"], document["dim"]) == (16, 16, 512)
    assert (document["engine"], document["compute"]) == (choose_engine(device="auto").engine, "fp32")
    seconds = document["seconds"]
    assert set(seconds) == {"hash", "loop", "decode", "forward", "write", "total"}
    assert seconds["forward"] < seconds["loop"] < seconds["total"] - seconds["hash"]
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
        return extract_features(pets, weights="random", engine="eager", cache_dir=tmp_path / folder, batch_size=4)

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


def test_cache_of_another_width__is_refused(pets: Path, tmp_path: Path) -> None:
    backbone = load_backbone("mobilenet_v3_small", weights="random")
    made = find_or_create(
        tmp_path / "cache",
        data_name="pets",
        data_root=pets,
        spec=EmbedOptions().spec(backbone),
        canaries=np.zeros((4, 7), np.float32),
    )
    with pytest.raises(CacheError) as refused:
        extract_features(pets, **SMALL, cache_dir=tmp_path / "cache")
    assert str(refused.value) == (
        f"{made.folder}: its rows are 7 wide, this backbone's 1024; remove the folder and run the same command again"
    )


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


SMALL = {"backbone": "mobilenet_v3_small", "weights": "random"}


def test_verify_content__reads_files_that_look_unchanged(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pets, tmp_path / "pets"))
    for path in folder.glob("*/*"):
        os.utime(path, ns=(10**18, 10**18))  # old enough for its time to vouch for it
    extract_features(folder, **SMALL)
    read: list[Path] = []
    monkeypatch.setattr(manifest_module, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    assert extract_features(folder, **SMALL).reused == 16
    assert read == []
    verified = extract_features(folder, **SMALL, verify_content=True)
    assert (verified.computed, verified.reused, len(read)) == (0, 16, 16)


def test_changed_content_behind_an_unchanged_look__is_found_by_verify_content(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pets, tmp_path / "pets"))
    for path in folder.glob("*/*"):
        os.utime(path, ns=(10**18, 10**18))
    before = extract_features(folder, **SMALL).table()
    changed = folder / "cat/3.png"
    Image.fromarray(np.full((8, 9, 3), 5, np.uint8)).save(changed)
    # A file system (or a restored backup) that shows nothing of the change: the record is made to say what it shows.
    status = changed.stat()
    known = {"cat/3.png": (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)}

    def as_if_unchanged(folder: Path | None) -> dict[str, Any]:
        rows = known_files(folder)
        return {path: (*known.get(path, record[:4]), record[4]) for path, record in rows.items()}

    os.utime(changed, ns=(10**18, 10**18))
    status = changed.stat()
    known["cat/3.png"] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    monkeypatch.setattr(extract_module, "known_files", as_if_unchanged)
    assert extract_features(folder, **SMALL).computed == 0
    found = extract_features(folder, **SMALL, verify_content=True)
    assert (found.computed, found.reused) == (1, 15)
    differs = (found.table().features != before.features).any(axis=1)
    assert np.flatnonzero(differs).tolist() == [3]


def test_parts__are_gathered_bit_for_bit(pets: Path, tmp_path: Path) -> None:
    whole = extract_features(pets, weights="random", batch_size=4, cache_dir=tmp_path / "whole")
    words = {"weights": "random", "batch_size": 4, "cache_dir": tmp_path / "parts"}
    parts = [extract_features(pets, part=f"{i}/3", **words) for i in (3, 1, 2)]
    assert [part.rows for part in parts] == [8, 4, 4]  # whole batches
    assert [part.cache.name.split("-resnet18")[0] for part in parts] == [f"pets-part{i}of3" for i in (3, 1, 2)]
    assert parts[0].next_command == (
        "tlc", "extract-features", str(pets), "--weights", "random", "--cache-dir", str(tmp_path / "parts"),
    )  # fmt: skip
    gathered = extract_features(pets, **words)
    assert (gathered.rows, gathered.computed, gathered.reused) == (16, 0, 16)
    assert gathered.table().paths == whole.table().paths
    assert gathered.table().features.tobytes() == whole.table().features.tobytes()
    np.testing.assert_array_equal(gathered.table().split, whole.table().split)
    # The cost of the parts came with their rows.
    record = gathered.record
    assert (record["images"], record["is_complete"], record["is_from_this_run"]) == (16, True, False)
    assert record["seconds"] == pytest.approx(sum(part.record["seconds"] for part in parts))


@pytest.mark.parametrize("part", ["0/4", "5/4", "4", "1/0", "a/b", "1/4/2", "1 / 4"])
def test_part__words_that_are_off(pets: Path, part: str) -> None:
    with pytest.raises(UsageError, match=f"--part {part!r} must be I/N, for example 1/4"):
        extract_features(pets, **SMALL, part=part)


def test_part__what_cannot_be_sliced(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="16 images are 4 batches of 4, too few for 5 parts; ask for 4 at most"):
        extract_features(pets, **SMALL, part="1/5", batch_size=4)
    (tmp_path / "fixes.csv").write_text("path,label\ncat/0.png,dog\n")
    with pytest.raises(UsageError, match="--labels: a part has no labels of its own"):
        extract_features(pets, **SMALL, part="1/2", labels=tmp_path / "fixes.csv")


def test_views__stay_until_others_are_asked_for(pets: Path, tmp_path: Path) -> None:
    first = extract_features(pets, **SMALL, views=2)
    assert (first.views, first.computed) == (2, 32)
    again = extract_features(pets, **SMALL)
    assert (again.views, again.computed, again.reused) == (2, 0, 32)
    shutil.copytree(pets, tmp_path / "pets")
    Image.fromarray(np.full((8, 9, 3), 77, np.uint8)).save(tmp_path / "pets/cat/new.png")
    assert extract_features(tmp_path / "pets", **SMALL, views=4).computed == 2 * 16 + 4
    assert extract_features(pets, **SMALL, views=1).views == 1
    with pytest.raises(UsageError, match="--views 256 must lie between 1 and 255"):
        extract_features(pets, **SMALL, views=256)


def test_views__of_the_network_are_what_the_network_sees(pets: Path) -> None:
    table = extract_features(pets, weights="random", views=3).table()
    backbone = load_backbone("resnet18", weights="random")
    engine = EagerEngine(backbone, torch.device("cpu"))
    for i in (0, 1, 2, 30, 31, 32):
        path = table.paths[i]
        digest = hashlib.sha256((pets / path).read_bytes()).digest()
        pixels = view_pixels(
            load_image(pets / path, path), backbone.preprocessing, digest=digest, view=int(table.view[i])
        )
        np.testing.assert_allclose(table.features[i], engine.embed(pixels[None])[0], rtol=1e-4, atol=1e-5)


def test_storage_dtype__is_another_cache_that_train_head_finds(pets: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"weights": "random"}  # a random MobileNet's embeddings are too small for float16
    half = extract_features(pets, **words, storage_dtype="float16")
    assert half.open().spec.storage_dtype == "float16"
    assert train_head(pets, **words, C=1.0, out=tmp_path / "a").cache == half.cache
    full = extract_features(pets, **words)
    assert (full.cache == half.cache, full.computed) == (False, 16)
    assert train_head(pets, **words, C=1.0, out=tmp_path / "b").cache == full.cache
    with pytest.raises(UsageError, match="--storage-dtype 'int8' is none of auto, float32, float16"):
        extract_features(pets, **words, storage_dtype="int8")


def test_other_versions__are_checked_and_told(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"weights": "random"}
    extract_features(pets, **words)
    environment = describe_environment()
    newer = {**environment, "versions": {**environment["versions"], "pillow": "99.0"}}
    monkeypatch.setattr(extract_module, "describe_environment", lambda: newer)
    checked = extract_features(pets, **words)
    assert (checked.checked, checked.computed, checked.reused) == (8, 0, 16)
    assert "8 computed again and found equal" in str(checked.render())
    assert extract_features(pets, **words).checked == 0


def test_cache_on_a_read_only_disk__is_used(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = extract_features(pets, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in made.cache.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # As root no permission binds, so every way to write is closed.
    for name in ("replace", "rename", "unlink", "mkdir", "pwrite", "fchmod", "posix_fallocate"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("transfercache.cache.store.locked", refuse)
    again = extract_features(pets, **SMALL)
    assert (again.computed, again.reused) == (0, 16)
    assert {path: path.stat().st_mtime_ns for path in made.cache.iterdir()} == before
