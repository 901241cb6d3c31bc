"""`tlc extract-features`: DATA -> frozen backbone -> cache, computing only what the cache lacks."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.backbones.devices import device_name, pick_device
from transfercache.backbones.engines import EagerEngine, canary_pixels
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.cache.reader import Cache, open_cache
from transfercache.cache.rows import OK
from transfercache.cache.store import Store, find, find_or_create
from transfercache.cache.table import FeatureTable
from transfercache.commands.inputs import BadImage, bad_images, cache_root, finish_manifest, known_files, log_bad
from transfercache.environment import describe_environment
from transfercache.errors import DataError
from transfercache.extract.run import Outcome, extract_into
from transfercache.images.manifest import Manifest
from transfercache.images.sources import read_source
from transfercache.spec import ExtractSpec
from transfercache.splits import count_straddling
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Extraction:
    """What one extraction did, and the cache it left."""

    cache: Path
    rows: int
    computed: int
    reused: int
    bad: tuple[BadImage, ...]
    straddling: int  # groups, or sets of equal images, that the given split divides
    dim: int
    seconds: dict[str, float]  # total: wall; hash; decode: summed over its threads; forward; write
    engine: str
    device: str

    @property
    def images_per_second(self) -> float | None:
        """Images computed per second of wall time, imports excluded; None where none was computed."""
        return self.computed / self.seconds["total"] if self.computed else None

    @property
    def record(self) -> dict[str, Any]:
        """What it took to make the rows that the cache holds, in plain JSON.

        seconds and images over all runs, interrupted ones included; runs, each with date, device, machine, seconds and
        images, and the date, device and machine of the largest; is_complete, False where the runs do not account for
        all rows (one was killed before it could say what it took); is_from_this_run, of all rows.
        """
        cache = self.open()
        good = cache.rows.status == OK
        n_held = len(set(zip(cache.rows.shard[good].tolist(), cache.rows.slot[good].tolist(), strict=True)))
        runs = [
            {
                **{name: run[name] for name in ("date", "device", "machine")},
                "seconds": run["seconds"]["total"],
                "images": run["computed"],
            }
            for run in cache.provenance
        ]
        largest = max(runs, key=lambda run: run["images"])
        images = sum(run["images"] for run in runs)
        return {
            **{name: largest[name] for name in ("date", "device", "machine")},
            "seconds": sum(run["seconds"] for run in runs if run["images"]),
            "images": images,
            "runs": [run for run in runs if run["images"]],
            "is_complete": images >= n_held,
            "is_from_this_run": self.computed > 0 and self.computed == images,
        }

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        return ("tlc", "train-head", str(self.cache))

    def open(self) -> Cache:
        """Open the cache for reading."""
        return open_cache(self.cache)

    def table(self, split: str | None = None) -> FeatureTable:
        """Return the good rows of a split (None: all), in the data's order."""
        return self.open().table(split)

    def arrays(self, split: str | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return (features float32 [N, D], labels int64 [N], -1 where unlabelled), for any estimator."""
        return self.open().arrays(split)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc extract-features`."""
        return {
            "cache": str(self.cache),
            "rows": self.rows,
            "computed": self.computed,
            "reused": self.reused,
            "bad": [item.to_json() for item in self.bad],
            "straddling": self.straddling,
            "dim": self.dim,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "engine": self.engine,
            "device": self.device,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from rich.text import Text

        pace = f", {self.images_per_second:.1f} images/s" if self.images_per_second else ""
        # Text: the path may hold what rich takes for markup.
        return Text(
            f"{self.cache}\n{self.rows} images, {self.dim} features each: {self.computed} computed, "
            f"{self.reused} reused in {self.seconds['total']:.1f} s{pace} ({self.engine}, {self.device})"
        )


def extract_features(
    data: str | Path,
    *,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    compute: config.Compute = config.COMPUTE,
    device: config.Device = config.DEVICE,
    batch_size: int = config.EXTRACT_BATCH_SIZE,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    on_bad: config.OnBad = config.ON_BAD,
) -> Extraction:
    """Embed every image of DATA with a frozen backbone, into a cache that later calls find again.

    Rows that the cache holds are reused, and an interrupted run goes on where it was. Unreadable images are listed
    in the result's `bad` and have no features; with `on_bad="fail"` they are also logged, as the command line ends
    with 3.

    Raises DataError (nothing to read, or every image bad), UsageError (unknown backbone), WeightsError, CacheError,
    ResourceError (disk, device), LockedError (another writer).
    """
    scanned_ns = time.time_ns()
    manifest = read_source(data)
    loaded = load_backbone(backbone, weights=weights)
    root = cache_root(cache_dir)
    folder = find(root, data_name=manifest.name, data_root=manifest.root, spec=extract_spec(loaded, compute))
    watch = Stopwatch()
    manifest = finish_manifest(
        manifest,
        watch=watch,
        known=known_files(folder),
        scanned_ns=scanned_ns,
        labels=labels,
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    result = extract_manifest(
        manifest,
        loaded,
        cache_dir=root,
        compute=compute,
        device=device,
        batch_size=batch_size,
        workers=workers,
        hash_seconds=watch.seconds()["hash"],
    )
    log_bad(result.bad, result.rows, on_bad=on_bad)
    if result.straddling:
        logger.warning("%d groups or sets of equal images lie on both sides of the given split", result.straddling)
    return result


def extract_manifest(
    manifest: Manifest,
    backbone: Backbone,
    *,
    cache_dir: Path,
    compute: config.Compute,
    device: config.Device,
    batch_size: int,
    workers: int | None,
    hash_seconds: float,
) -> Extraction:
    """Embed the rows of a manifest that `inputs.finish_manifest` has finished, in `hash_seconds`, into its cache."""
    watch = Stopwatch({"hash": hash_seconds})
    target = pick_device(device)
    make_engine = functools.cache(lambda: EagerEngine(backbone, target))
    store = _store(cache_dir, manifest, extract_spec(backbone, compute), make_engine)

    def describe_run(outcome: Outcome) -> Mapping[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "computed": outcome.computed,
            "seconds": watch.seconds(),
            "engine": EagerEngine.name,
            "device": device_name(target),
            "batch_size": batch_size,
            "weights": backbone.weights_source,
            **describe_environment(),
        }

    outcome = extract_into(
        store,
        manifest,
        make_engine,
        backbone.preprocessing,
        batch_size=batch_size,
        workers=workers,
        watch=watch,
        describe_run=describe_run,
    )
    if len(outcome.bad) == manifest.n_rows:
        first = min(outcome.bad)
        raise DataError(
            f"{manifest.paths[first]}: {outcome.bad[first]}; and no other image of {manifest.root} is readable"
        )
    labelled = manifest.labels >= 0
    return Extraction(
        cache=store.folder,
        rows=manifest.n_rows,
        computed=outcome.computed,
        reused=outcome.reused,
        bad=bad_images(manifest, outcome.bad),
        straddling=count_straddling(manifest.split[labelled], manifest.component()[labelled]),
        dim=backbone.dim,
        seconds={"decode": 0.0, "forward": 0.0, "write": 0.0} | watch.seconds(),
        engine=EagerEngine.name,
        device=device_name(target),
    )


def extract_spec(backbone: Backbone, compute: config.Compute) -> ExtractSpec:
    """Return the identity of the rows that this backbone makes; `auto` is fp32 on every device."""
    return ExtractSpec(
        backbone=backbone.name,
        weights_digest=backbone.weights_digest,
        boundary=backbone.boundary,
        preprocessing=backbone.preprocessing,
        compute="fp32" if compute == "auto" else compute,
    )


def _store(cache_dir: Path, manifest: Manifest, spec: ExtractSpec, make_engine: Callable[[], EagerEngine]) -> Store:
    folder = find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec)
    if folder is not None:
        return Store(folder)
    canaries = make_engine().embed(canary_pixels(spec.preprocessing.crop))  # float32 [4, D]
    return find_or_create(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec, canaries=canaries)


def find_cache_of(manifest: Manifest, *, backbone: str, weights: str, cache_dir: Path) -> Path | None:
    """Return the cache folder that `extract_features` made of this DATA with this backbone, or None."""
    spec = extract_spec(load_backbone(backbone, weights=weights), config.COMPUTE)
    return find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec)
