from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfercache.commands.extract import extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.inputs import finish_manifest
from transfercache.errors import DataError, UsageError
from transfercache.images.manifest import Manifest
from transfercache.images.sources import read_source
from transfercache.stopwatch import Stopwatch


def finished(data: Path, labels: Path) -> Manifest:
    return finish_manifest(
        read_source(data), labels=labels, val_fraction=0.2, split_seed=0, known={}, watch=Stopwatch()
    )


def test_finish_manifest__flat_folder_takes_its_classes_from_the_file(
    tmp_path: Path, draw_photos: Callable[..., Path]
) -> None:
    flat = draw_photos(tmp_path / "flat", [f"{number}.png" for number in range(3)])
    (tmp_path / "fixes.csv").write_text("path,label\n2.png,cat\n0.png,dog\n")
    manifest = finished(flat, tmp_path / "fixes.csv")
    assert manifest.class_names == ("cat", "dog")
    assert manifest.labels.tolist() == [1, -1, 0]
    assert manifest.paths == ("0.png", "1.png", "2.png")


def test_finish_manifest__unknown_class(tmp_path: Path, draw_photos: Callable[..., Path]) -> None:
    photos = draw_photos(tmp_path / "photos", ["ants/1.png"])
    (tmp_path / "fixes.csv").write_text("path,label\nants/1.png,antz\n")
    with pytest.raises(DataError, match=r"'antz', which is no class of the data \(did you mean ants\?\)"):
        finished(photos, tmp_path / "fixes.csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch_size": -3}, "--batch-size -3: must be at least 1"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"on_bad": "foo"}, "--on-bad 'foo' is none of fail, skip"),
    ],
)
def test_options_that_are_off__are_refused_before_anything_is_read(words: dict[str, Any], message: str) -> None:
    for command in (extract_features, finetune):
        with pytest.raises(UsageError, match=f"^{message}$"):
            command("no-such-data", weights="random", **words)
