"""Labels from a file laid over a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transfercache.images.manifest import Manifest
from transfercache.overlay import overlay


def overlay_labels(manifest: Manifest, csv_path: Path) -> Manifest:
    """Return `manifest` with the labels of `csv_path` (`path,label`) laid over; see `transfercache.overlay`.

    Lay labels over before `split_rows`: the split is made from the labels. Raises DataError.
    """
    labels, class_names = overlay(manifest.paths, manifest.labels, manifest.class_names, csv_path)
    return replace(manifest, labels=labels, class_names=class_names)
