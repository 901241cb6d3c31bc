"""A small cache with known content: image i has the digest of its number and features drawn from that number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.catalogue import FILE_NAME
from transfercache.cache.provenance import Run
from transfercache.cache.rows import Rows
from transfercache.cache.store import Store, find_or_create
from transfercache.files import sha256_bytes
from transfercache.spec import ExtractSpec, Preprocessing

DIM = 6
BATCH_SIZE = 4
CLASS_NAMES = ("ant", "bee")


def a_run(**changes: Any) -> Run:
    """A record of ten rows, computed in a second and a half."""
    values: dict[str, Any] = {
        "date": "2026-01-02T03:04:05+00:00",
        "computed": 10,
        "reused": 0,
        "checked": 0,
        "copied_from": None,
        "seconds": {"total": 1.5},
        "engine": "eager",
        "device": "cpu",
        "batch_size": BATCH_SIZE,
        "weights": {"kind": "random", "where": "seed 0"},
        "machine": {"processor": "made", "cores": 2},
        "versions": {"torch": "2.9", "pillow": "12.0", "numpy": "2.0"},
    }
    return Run(**{**values, **changes})


class SmallExtraction:
    """What the extract room does, on `n_images` made rows; image `bad` (if any) is never written."""

    def __init__(self, *, n_images: int = 10, bad: int | None = None) -> None:
        self.n_images, self.bad = n_images, bad
        self.digests = np.frombuffer(
            b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(n_images)), np.uint8
        ).reshape(n_images, 32)
        self.features = np.stack([np.random.default_rng(i).standard_normal(DIM) for i in range(n_images)]).astype("f4")
        self.spec = ExtractSpec(
            backbone="resnet18",
            weights_digest="ab" * 32,
            boundary="pooled",
            preprocessing=Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        )
        self.canaries = np.random.default_rng(99).standard_normal((4, DIM)).astype("f4")
        self.split = np.array([(1, 1, 2)[i % 3] for i in range(n_images)], np.uint8)
        self.label = np.arange(n_images) % 2

    def store(self, cache_dir: Path, *, data_root: Path = Path("/data/insects")) -> Store:
        return find_or_create(
            cache_dir, data_name="insects", data_root=data_root, spec=self.spec, canaries=self.canaries
        )

    def steps(self, cache_dir: Path, *, written: list[int] | None = None) -> Iterator[str]:
        """Extract into `cache_dir`, resuming what is there; pauses, still locked, after each step."""
        store = self.store(cache_dir)
        yield "made"
        with store.writing():
            if not store.catalogue.shards:
                store.begin_shard(self.digests, np.zeros(self.n_images, np.uint8), batch_size=BATCH_SIZE)
                yield "begun"
            if not store.entry(0).finished:
                missing = ~store.slots().valid
                with store.writer(0) as writer:
                    for start in range(0, self.n_images, BATCH_SIZE):
                        slots = start + np.flatnonzero(missing[start : start + BATCH_SIZE])
                        slots = slots[slots != self.bad]
                        if len(slots):
                            writer.write(slots, self.features[slots])
                            writer.commit()
                            if written is not None:
                                written.extend(slots.tolist())
                            yield f"wrote from {start}"
                store.finish_shard(0)
                yield "finished"
            store.publish(self.rows(), class_names=CLASS_NAMES, run=a_run())
        yield "published"

    def run(self, cache_dir: Path, *, written: list[int] | None = None) -> Path:
        for _ in self.steps(cache_dir, written=written):
            pass
        return next(path for path in cache_dir.iterdir() if path.is_dir())

    def rows(self, **changes: Any) -> Rows:
        n = self.n_images
        is_bad = np.arange(n) == self.bad
        values: dict[str, Any] = {
            "path": tuple(f"train/é{i}.jpg" for i in range(n)),
            "size": np.arange(n) + 1000,
            "mtime_ns": np.arange(n) + 10,
            "ctime_ns": np.arange(n) + 20,
            "inode": np.arange(n) + 30,
            "digest": self.digests,
            "view": np.zeros(n, np.uint8),
            "label": self.label,
            "split": self.split,
            "group": np.arange(n),
            "status": is_bad.astype(np.uint8),
            "reason": tuple("truncated" if i == self.bad else "" for i in range(n)),
            "shard": np.where(is_bad, -1, 0).astype(np.int32),
            "slot": np.where(is_bad, -1, np.arange(n)),
        }
        return Rows(**{**values, **changes})


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # A killed process loses nothing that it gave to the system, so that here a sync is time alone. That it is called,
    # and when, is tested on its own.
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


@pytest.fixture
def extraction() -> SmallExtraction:
    return SmallExtraction()


@pytest.fixture
def make_run() -> Callable[..., Run]:
    return a_run


@pytest.fixture
def make_extraction() -> type[SmallExtraction]:
    return SmallExtraction


@pytest.fixture
def finished(tmp_path: Path, extraction: SmallExtraction) -> Path:
    """The folder of a finished cache of ten images."""
    return extraction.run(tmp_path / "cache")


@pytest.fixture
def tamper() -> Callable[[Path, int], None]:
    """Flip the lowest bit of the byte at an offset, read-only files included."""

    def flip(path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)

    return flip


@pytest.fixture
def rewrite_catalogue() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """Change the catalogue's JSON and give it a right checksum again, as a forger would."""

    def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((folder / FILE_NAME).read_bytes())
        del value["checksum"]
        change(value)
        covered = json.dumps(value)[1:].encode()
        (folder / FILE_NAME).write_bytes(b'{"checksum":"%s",\n' % sha256_bytes(covered).encode() + covered)

    return rewrite
