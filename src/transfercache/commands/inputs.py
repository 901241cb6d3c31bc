"""What every command starts from: the cache folder's root, and DATA as labelled, hashed and split rows. Torch-free."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from transfercache import config
from transfercache.cache.store import Store
from transfercache.errors import CacheError, UsageError
from transfercache.images.manifest import KnownFile, Manifest, hash_files, split_rows
from transfercache.overlay import overlay
from transfercache.spec import DECODERS, POOLED, ExtractSpec
from transfercache.stopwatch import Stopwatch
from transfercache.text import name_flag, name_value

if TYPE_CHECKING:
    from transfercache.backbones.known import FrozenBackbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadImage:
    """A file that could not be used, and why."""

    path: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the object under `bad` of the command line's JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EmbedOptions:
    """How images are embedded, as `extract_features` and `compare` take it."""

    compute: config.Compute = config.COMPUTE
    storage_dtype: config.StorageDtype = config.STORAGE_DTYPE
    views: int | None = None
    batch_size: int | None = None  # as the device has it
    workers: int | None = None
    decode: config.Decode = config.DECODE
    max_bytes: str | int | None = None  # such as 20GB; None: MAX_BYTES for activations, else no bound

    def __post_init__(self) -> None:
        if self.views is not None and not 1 <= self.views <= config.MAX_VIEWS:
            raise UsageError(f"--views {self.views} must lie between 1 and {config.MAX_VIEWS}")
        if self.storage_dtype not in get_args(config.StorageDtype):
            known = ", ".join(get_args(config.StorageDtype))
            raise UsageError(f"--storage-dtype {self.storage_dtype!r} is none of {known}")
        if self.decode not in DECODERS:
            raise UsageError(f"--decode {self.decode!r} is none of {', '.join(DECODERS)}")
        check_counts(batch_size=self.batch_size, workers=self.workers)

    def spec(self, backbone: FrozenBackbone) -> ExtractSpec:
        """Return the identity of the rows that this backbone makes; `auto` precision is fp32 on every device.

        `auto` storage is float32 for embeddings and float16 for activations, which take a hundred times as much.
        """
        dtype = "float32" if backbone.boundary == POOLED else "float16"
        return ExtractSpec(
            backbone=backbone.name,
            weights_digest=backbone.weights_digest,
            boundary=backbone.boundary,
            preprocessing=replace(backbone.preprocessing, decoder=self.decode),
            compute="fp32" if self.compute == "auto" else self.compute,
            storage_dtype=dtype if self.storage_dtype == "auto" else self.storage_dtype,
        )


def check_counts(**counts: int | None) -> None:
    """Raise UsageError for an option below 1; None leaves it open."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name_flag(name)} {count}: must be at least 1")


def check_on_bad(on_bad: str) -> None:
    """Raise UsageError for another word than fail and skip."""
    if on_bad not in get_args(config.OnBad):
        raise UsageError(f"--on-bad {on_bad!r} is none of {', '.join(get_args(config.OnBad))}")


def cache_root(cache_dir: Path | str | None) -> Path:
    """Return where caches live: the argument, else $TRANSFERCACHE_DIR, else ./cache."""
    return Path(cache_dir or os.environ.get(config.CACHE_DIR_VARIABLE) or config.CACHE_DIR)


def changed_words(**options: tuple[object, object]) -> tuple[str, ...]:
    """Return `--name value` of each (value, default) where these differ."""
    changed = {name: value for name, (value, default) in options.items() if value != default}
    return tuple(word for name, value in changed.items() for word in (f"--{name_flag(name)}", name_value(value)))


def finish_manifest(
    manifest: Manifest,
    *,
    labels: Path | str | None,
    val_fraction: float,
    split_seed: int,
    known: Mapping[str, KnownFile],
    watch: Stopwatch,
) -> Manifest:
    """Hash the files of a scanned source, split its rows where it gives no split, and overlay labels.

    The split is drawn from the source's own labels, so that an overlay does not move rows between splits; rows that
    only the overlay labels are split among themselves. Logs what was left out, and charges `hash` of `watch`.
    """
    with watch.stage("hash"):
        manifest = hash_files(manifest, known=known)
    manifest = split_rows(manifest, val_fraction=val_fraction, split_seed=split_seed)
    if labels is not None:
        codes, class_names = overlay(manifest.paths, manifest.labels, manifest.class_names, Path(labels))
        manifest = replace(manifest, labels=codes, class_names=class_names)
        manifest = split_rows(manifest, val_fraction=val_fraction, split_seed=split_seed)
    log_skipped(manifest)
    return manifest


def log_skipped(manifest: Manifest) -> None:
    """Name the first file of each kind that was not taken, how many there are, and why."""
    for reason, (first, count) in manifest.skipped.items():
        others = f" and {count - 1} more" if count > 1 else ""
        logger.warning("left out: %s%s (%s)", first, others, reason)


def bad_images(manifest: Manifest, reasons: Mapping[int, str]) -> tuple[BadImage, ...]:
    """Return the bad rows of a manifest in row order: those that could not be hashed, then decoded."""
    merged = {**manifest.unreadable, **reasons}
    return tuple(BadImage(manifest.paths[row], merged[row]) for row in sorted(merged))


def known_files(folder: Path | None) -> dict[str, KnownFile]:
    """Return what the cache at `folder` knows of its files, so that unchanged ones are not read to be hashed."""
    if folder is None:
        return {}
    rows = Store(folder).rows()
    return {} if rows is None else rows.known_files()


def known_views(folder: Path | None, *, mend: bool = False) -> int:
    """Return how many rows the cache at `folder` has of each image; without one, how many it would be given.

    With `mend`, where the rows file is damaged, as many as the shards have: no fewer are lost.
    """
    if folder is None:
        return config.VIEWS
    store = Store(folder)
    try:
        rows = store.rows()
    except CacheError as error:
        if not mend:
            raise
        logger.warning("it is written again: %s", error)
        shards = {entry.number for entry in store.catalogue.shards}
        return int(store.slots(prove=shards).view.max(initial=0)) + 1
    return config.VIEWS if rows is None else rows.n_views


def log_bad(bad: Sequence[BadImage], n_images: int, *, on_bad: config.OnBad) -> None:
    """Say in the log how many images were left out, unless that was accepted."""
    if bad and on_bad == "fail":
        logger.warning(
            "%d of %d images are unreadable; all others are done and kept: mend or remove those, or pass --on-bad skip",
            len(bad),
            n_images,
        )
