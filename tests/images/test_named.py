from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from transfercache.errors import DownloadError
from transfercache.images import named
from transfercache.images.named import NAMED, digits_subset, materialise
from transfercache.images.sources import read_source


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "transfercache"


def test_materialise__digits_are_png_files_in_class_folders(cache_home: Path) -> None:
    manifest = read_source("digits")
    assert (manifest.name, manifest.root) == ("digits", cache_home / "digits")
    assert manifest.n_rows == 1797
    assert manifest.class_names == tuple("0123456789")
    digits = load_digits()
    by_index = sorted(range(1797), key=lambda row: Path(manifest.paths[row]).name)
    np.testing.assert_array_equal(manifest.labels[by_index], digits.target)
    for index in (0, 9, 1796):
        row = by_index[index]
        assert manifest.paths[row] == f"{digits.target[index]}/{index:04d}.png"
        with Image.open(manifest.path_of(row)) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), np.minimum(digits.images[index] * 16, 255))
    assert os.listdir(cache_home) == ["digits"]


def test_materialise__is_made_once(cache_home: Path) -> None:
    (cache_home / "digits").mkdir(parents=True)
    assert materialise("digits") == cache_home / "digits"
    assert not list((cache_home / "digits").iterdir())


def test_digits_subset__first_of_each_class(cache_home: Path) -> None:
    manifest = read_source(digits_subset(3))
    assert manifest.name == "digits-3"
    assert np.bincount(manifest.labels).tolist() == [3] * 10
    target = load_digits().target
    assert manifest.paths[:3] == tuple(f"0/{index:04d}.png" for index in np.flatnonzero(target == 0)[:3].tolist())
    assert digits_subset(3) == manifest.root


def test_read_source__an_existing_folder_goes_before_a_name(
    cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits_subset(1), tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert read_source("digits").n_rows == 10


def test_materialise__hymenoptera_that_cannot_be_reached(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_HYMENOPTERA_URL", "http://127.0.0.1:9/hymenoptera_data.zip")
    with pytest.raises(DownloadError, match=r"hymenoptera_data\.zip: cannot be downloaded .* or put the file at "):
        materialise("hymenoptera")
    assert not (cache_home / "hymenoptera").exists()


@pytest.mark.real
def test_materialise__hymenoptera_from_an_archive_in_place(
    cache_home: Path, real_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = real_weights.parents[1] / "hymenoptera_data.zip"
    cache_home.mkdir(parents=True)
    shutil.copyfile(archive, cache_home / "hymenoptera_data.zip")
    # The archive beside the checkout holds the same files, packed again, so its digest is its own.
    monkeypatch.setattr(
        named, "_HYMENOPTERA_SHA256", "bc1020479ee5666eeee76d1361d2c4a91b3676a13e52a761e5da689f175b037e"
    )
    manifest = read_source("hymenoptera")
    assert (manifest.name, manifest.n_rows, manifest.class_names) == ("hymenoptera", 397, ("ants", "bees"))
    assert manifest.root == cache_home / "hymenoptera" / "hymenoptera_data"
    assert [name for name in os.listdir(cache_home) if not name.startswith(".")] == ["hymenoptera"]


def test_named__the_sets() -> None:
    assert sorted(NAMED) == ["digits", "hymenoptera"]
