"""`tlc extract-features`: DATA -> frozen backbone -> cache, computing only what the cache lacks."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.choice import Choice, Engine, choose_engine
from transfercache.backbones.known import FrozenBackbone, find_backbone
from transfercache.cache.provenance import Run, makers_of
from transfercache.cache.reader import Cache, open_cache
from transfercache.cache.rows import OK
from transfercache.cache.store import Store, find, find_or_create
from transfercache.cache.table import FeatureTable
from transfercache.commands.inputs import (
    BadImage,
    EmbedOptions,
    bad_images,
    cache_root,
    changed_words,
    check_on_bad,
    finish_manifest,
    known_files,
    known_views,
    log_bad,
)
from transfercache.commands.space import check_space
from transfercache.environment import describe_environment
from transfercache.errors import CacheError, DataError, UsageError
from transfercache.extract.loop import Embedder
from transfercache.extract.run import ExtractionRun, Outcome
from transfercache.images.decode import pick_decoder
from transfercache.images.manifest import Manifest, take_part
from transfercache.images.sources import read_source
from transfercache.plain import fields_of
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
    rows: int  # images
    views: int  # rows of each image
    computed: int  # view rows
    reused: int
    checked: int  # rows of other versions, computed again for comparison
    bad: tuple[BadImage, ...]
    straddling: int  # groups, or sets of equal images, that the given split divides
    dim: int
    # total: wall; hash; loop: wall, of decode, summed over its workers, forward and write, side by side
    seconds: dict[str, float]
    engine: str
    compute: str  # fp32 | bf16 | fp16
    device: str
    next_command: tuple[str, ...]  # the words of the command a person would run next

    @property
    def images_per_second(self) -> float | None:
        """Images passed forward per second of wall time, each view being one; None where none was computed."""
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
                "date": run.date,
                "device": run.device,
                "machine": run.machine,
                "seconds": run.seconds["total"],
                "images": run.computed,
            }
            for run in cache.provenance
            if run.computed
        ]
        images = sum(run.computed for run in cache.provenance)
        largest = max(cache.provenance, key=lambda run: run.computed)
        return {
            "date": largest.date,
            "device": largest.device,
            "machine": largest.machine,
            "seconds": sum(run.seconds["total"] for run in cache.provenance if run.computed),
            "images": images,
            "runs": runs,
            "is_complete": images >= n_held,
            "is_from_this_run": self.computed > 0 and self.computed == images,
        }

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
            **fields_of(self, without=("engine", "compute", "device", "next_command")),
            "images_per_second": self.images_per_second,
            "engine": self.engine,
            "compute": self.compute,
            "device": self.device,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from rich.text import Text

        pace = f", {self.images_per_second:.1f} images/s" if self.images_per_second else ""
        views = f" in {self.views} views" if self.views > 1 else ""
        checked = f", {self.checked} computed again and found equal" if self.checked else ""
        by = f"{self.engine} {self.compute}, {self.device}"
        # Text: the path may hold what rich takes for markup.
        return Text(
            f"{self.cache}\n{self.rows} images{views}, {self.dim} features each: {self.computed} computed, "
            f"{self.reused} reused{checked} in {self.seconds['total']:.1f} s{pace} ({by})"
        )


def extract_features(
    data: str | Path,
    *,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    boundary: str = config.BOUNDARY,
    views: int | None = None,
    storage_dtype: config.StorageDtype = config.STORAGE_DTYPE,
    max_bytes: str | int | None = None,
    compute: config.Compute = config.COMPUTE,
    decode: config.Decode = config.DECODE,
    device: config.Device = config.DEVICE,
    engine: config.Engine = config.ENGINE,
    batch_size: int | None = None,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    part: str | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    verify_content: bool = False,
    on_bad: config.OnBad = config.ON_BAD,
    on_engine: Callable[[str], None] = lambda line: None,
) -> Extraction:
    """Embed every image of DATA with a frozen backbone, into a cache that later calls find again.

    `boundary` is pooled, the input of the network's last linear layer, or one of its stages, at whose end the
    activations are taken, for `finetune` with `cached`. These are stored as float16 unless `storage_dtype` says
    otherwise; more of them than `max_bytes` (such as "20GB", the default) are refused before anything is written.

    Rows that this cache holds, or another of the same spec under `cache_dir`, are reused, and an interrupted run goes
    on where it was. `views` are rows of each image (0 the eval transform, 1 its mirror image, then drawn
    augmentations); None keeps those that the cache has, else one. `part` "I/N" embeds the I-th of N slices, the same
    on every device, into a cache of its own, for the call without `part` to gather. `verify_content` hashes every file,
    also where size, times and inode are as before, and proves every row: what fails is made again. Unreadable images
    are listed in the result's `bad` and have no features; with `on_bad="fail"` they are also logged, as the command
    line ends with 3.
    `compute` and `decode` (docs/images.md) are part of what a cache is, `engine` is not. `batch_size` None is 32, on an
    NVIDIA GPU 256. `on_engine` is given a line on what activations will take, and one on what computes, and what would
    be faster, before a first image is embedded.

    Raises DataError (nothing to read, or every image bad), UsageError (unknown backbone or boundary, or too many
    bytes), WeightsError, CacheError
    (also where other versions made the rows and this machine would make others), ResourceError (disk, device, an
    engine or a precision that this machine lacks), LockedError (another writer).
    """
    options = EmbedOptions(compute, storage_dtype, views, batch_size, workers, decode, max_bytes)
    check_on_bad(on_bad)
    choice = choose_engine(engine, device=device, compute=compute)
    manifest = read_source(data)
    if part is not None:
        if labels is not None:
            raise UsageError("--labels: a part has no labels of its own; give them to the command without --part")
        # Not by the device's batches: parts that are made on different devices must be slices of one cut.
        manifest = take_part(manifest, part, batch_size=batch_size or config.EXTRACT_BATCH_SIZE)
    loaded = find_backbone(backbone, weights=weights)
    pick_decoder(options.spec(loaded).preprocessing)  # what cannot be loaded fails now
    if boundary != config.BOUNDARY:
        from transfercache.backbones.cut import frozen_part

        loaded = frozen_part(loaded.load(), boundary)
    root = cache_root(cache_dir)
    folder = find(root, data_name=manifest.name, data_root=manifest.root, spec=options.spec(loaded))
    watch = Stopwatch()
    manifest = finish_manifest(
        manifest,
        watch=watch,
        known={} if verify_content else known_files(folder),
        labels=labels,
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    extractor = Extractor(manifest, root, options, choice, watch.seconds()["hash"])
    result = extractor.extract(loaded, prove=verify_content, on_engine=on_engine)
    log_bad(result.bad, result.rows, on_bad=on_bad)
    if result.straddling:
        logger.warning("%d groups or sets of equal images lie on both sides of the given split", result.straddling)
    shared = changed_words(
        backbone=(backbone, config.BACKBONE),
        weights=(weights, config.WEIGHTS),
        views=(views, None),
        storage_dtype=(storage_dtype, config.STORAGE_DTYPE),
        max_bytes=(max_bytes, None),
        cache_dir=(cache_dir, None),
        val_fraction=(val_fraction, config.VAL_FRACTION),
        split_seed=(split_seed, config.SPLIT_SEED),
    )
    if part is not None:
        own = changed_words(
            boundary=(boundary, config.BOUNDARY), compute=(compute, config.COMPUTE), decode=(decode, config.DECODE)
        )
        return replace(result, next_command=("tlc", "extract-features", str(data), *own, *shared))
    if boundary != config.BOUNDARY:
        names = [stage.name for stage in loaded.load().stages]
        own = ("--unfreeze", ",".join(names[names.index(boundary) + 1 :]), *changed_words(labels=(labels, None)))
        return replace(result, next_command=("tlc", "finetune", str(data), "--cached", *own, *shared))
    return result


@dataclass(frozen=True, eq=False)
class Extractor:
    """Embeds the rows of a manifest that `inputs.finish_manifest` has finished, into the cache of each backbone."""

    manifest: Manifest
    cache_dir: Path
    options: EmbedOptions
    choice: Choice
    hash_seconds: float  # that finishing took

    def extract(
        self,
        backbone: FrozenBackbone,
        *,
        prove: bool = False,
        on_engine: Callable[[str], None] = lambda line: None,
    ) -> Extraction:
        """Embed what the backbone's cache lacks; with `prove` its rows are proved, and what is damaged is made again.

        `on_engine` is as of `extract_features`.
        """
        manifest, cache_dir, options, choice = self.manifest, self.cache_dir, self.options, self.choice
        watch = Stopwatch({"hash": self.hash_seconds})
        batch_size = options.batch_size or choice.batch_size

        @functools.cache
        def make_engine() -> Engine:
            on_engine(choice.describe())
            return choice.build(backbone)

        spec = options.spec(backbone)
        folder = find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec)
        n_views = options.views or known_views(folder, mend=prove)
        check_space(
            manifest,
            spec,
            dim=backbone.dim,
            n_views=n_views,
            max_bytes=options.max_bytes,
            cache_dir=cache_dir,
            folder=folder,
            on_line=on_engine,
        )
        store = Store(folder) if folder is not None else _new_store(cache_dir, manifest, spec, make_engine)
        if store.catalogue.dim != backbone.dim:
            raise CacheError(
                f"{store.folder}: its rows are {store.catalogue.dim} wide, this backbone's {backbone.dim}; "
                "remove the folder and run the same command again"
            )
        environment = describe_environment()
        makers = makers_of(choice.engine, environment["versions"])

        def describe_run(outcome: Outcome) -> Run:
            return Run(
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                computed=outcome.computed,
                reused=outcome.reused,
                checked=outcome.checked,
                copied_from=None,
                seconds=watch.seconds(),
                engine=choice.engine,
                device=choice.device_name,
                batch_size=batch_size,
                weights=dict(backbone.weights_source),
                **environment,
            )

        outcome = ExtractionRun(
            store=store,
            embedder=Embedder(manifest, store.catalogue.spec, make_engine, options.workers, watch, makers),
            n_views=n_views,
            batch_size=batch_size,
            prove=prove,
            describe_run=describe_run,
        ).run()
        if len(outcome.bad) == manifest.n_rows:
            first = min(outcome.bad)
            raise DataError(
                f"{manifest.paths[first]}: {outcome.bad[first]}; and no other image of {manifest.shown} is readable"
            )
        good_labels = manifest.labels.copy()
        good_labels[list(outcome.bad)] = -1
        return Extraction(
            cache=store.folder,
            rows=manifest.n_rows,
            views=n_views,
            computed=outcome.computed,
            reused=outcome.reused,
            checked=outcome.checked,
            bad=bad_images(manifest, outcome.bad),
            straddling=count_straddling(manifest.split, good_labels, manifest.component),
            dim=backbone.dim,
            seconds=dict.fromkeys(("loop", "decode", "forward", "write"), 0.0) | watch.seconds(),
            engine=choice.engine,
            compute=choice.compute,
            device=choice.device_name,
            next_command=("tlc", "train-head", str(store.folder)),
        )


def _new_store(cache_dir: Path, manifest: Manifest, spec: ExtractSpec, make_engine: Callable[[], Engine]) -> Store:
    canaries = make_engine().embed(canary_pixels(spec.preprocessing.crop))  # float32 [4, D]
    return find_or_create(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec, canaries=canaries)


def find_cache_of(manifest: Manifest, *, backbone: str, weights: str, cache_dir: Path) -> Path | None:
    """Return the cache folder that `extract_features` made of this DATA with this backbone, or None.

    Of several, the one that is nearest to the default decoder, precision and storage dtype.
    """
    loaded = find_backbone(backbone, weights=weights)
    choices = itertools.product(get_args(config.Decode), get_args(config.Compute), get_args(config.StorageDtype))
    options = (EmbedOptions(compute, dtype, decode=decode) for decode, compute, dtype in choices)
    specs = dict.fromkeys(item.spec(loaded) for item in options)  # auto is one of the others
    found = (find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec) for spec in specs)
    return next((folder for folder in found if folder is not None), None)
