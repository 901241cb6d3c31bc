from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from transfercache.errors import DataError
from transfercache.images.labels import overlay_labels
from transfercache.images.sources import read_source


def test_overlay_labels__flat_folder_takes_its_classes_from_the_file(
    tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    for number in range(3):
        write_image(tmp_path / "flat" / f"{number}.jpg", number)
    (tmp_path / "fixes.csv").write_text("path,label\n2.jpg,cat\n0.jpg,dog\n")
    manifest = overlay_labels(read_source(tmp_path / "flat"), tmp_path / "fixes.csv")
    assert manifest.class_names == ("cat", "dog")
    assert manifest.labels.tolist() == [1, -1, 0]
    assert manifest.paths == ("0.jpg", "1.jpg", "2.jpg")


def test_overlay_labels__unknown_class(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "photos" / "ants" / "1.jpg")
    (tmp_path / "fixes.csv").write_text("path,label\nants/1.jpg,antz\n")
    with pytest.raises(DataError, match=r"'antz', which is no class of the data \(did you mean ants\?\)"):
        overlay_labels(read_source(tmp_path / "photos"), tmp_path / "fixes.csv")
