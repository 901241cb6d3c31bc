"""`tlc compare`: several strategies on the same rows, with what each costs."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transfercache import config
from transfercache.backbones.available import RANDOM
from transfercache.backbones.choice import choose_engine
from transfercache.backbones.cut import frozen_part
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.cache.store import find
from transfercache.commands.boundary import cache_activations
from transfercache.commands.extract import Extraction, Extractor
from transfercache.commands.inputs import (
    BadImage,
    EmbedOptions,
    bad_images,
    cache_root,
    changed_words,
    check_counts,
    check_on_bad,
    finish_manifest,
    known_files,
    known_views,
    log_bad,
)
from transfercache.comparison.rows import ComparedRows, find_unreadable, select_rows
from transfercache.comparison.schedule import Job, OnEstimate, plan_jobs, run_jobs
from transfercache.comparison.strategies import pick_strategies
from transfercache.comparison.strategy import Setting, Source
from transfercache.comparison.summary import Entry, LeftOut, Summary
from transfercache.environment import describe_environment
from transfercache.errors import UsageError
from transfercache.files import check_writable, write_atomic
from transfercache.images.decode import pick_decoder
from transfercache.images.manifest import Manifest, check_trainable
from transfercache.images.sources import read_source
from transfercache.report.comparison import html_table, result_line, terminal_table
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "results"
#: What a comparison can recommend, and the command that does it on the whole of the data.
_HEADS = ("logistic", "ridge", "linear")
_PROBED_FIRST = "lp-ft"
_ON_IMAGES = ("finetune", "partial")


@dataclass(frozen=True, eq=False)
class Comparison:
    """The strategies that are done, side by side; a table in a notebook."""

    summary: Summary
    bad: tuple[BadImage, ...]
    data: str
    weights: str
    caches: dict[str, Path]  # backbone -> cache folder, where it was extracted
    label_words: tuple[str, ...]  # the options that decide on labels, and on the split, where they are not the defaults
    split_words: tuple[str, ...]
    epoch_words: tuple[str, ...]
    cache_words: tuple[str, ...]
    network_words: tuple[str, ...]  # of what embeds, where they are not the defaults
    demo: Mapping[str, str | None] | None = None  # of `tlc demo`: data, backbone, and why they are not the tutorial's

    @property
    def next_command(self) -> tuple[str, ...]:
        """Train the most accurate of what leaves a model (ties: the cheapest), on the same rows; of LP-FT, the head."""
        if self.demo is not None:
            return ("tlc", "compare", "my_photos/", "--backbone", str(self.demo["backbone"]))
        models = [e for e in self.summary.entries if e.first.strategy in (*_HEADS, _PROBED_FIRST, *_ON_IMAGES)]
        if not models:
            rows = (*self.cache_words, *self.label_words, *self.split_words, *self.epoch_words)
            return ("tlc", "compare", self.data, *self.network_words, *rows)
        best = max(models, key=lambda entry: entry.accuracy).first
        backbone = str(best.backbone)
        if best.strategy not in _ON_IMAGES:
            solver = config.SOLVER if best.strategy == _PROBED_FIRST else best.strategy
            # The cache has the split: drawn anew, from labels that a file has changed, it would be another.
            return ("tlc", "train-head", str(self.caches[backbone]), "--solver", solver, *self.label_words)
        start = ("tlc", "finetune", self.data, "--backbone", backbone, "--weights", self.weights)
        stages = [stage for group in best.chosen["groups"][:-1] for stage in group["stages"]]
        cached = ("--unfreeze", ",".join(stages), "--cached", *self.cache_words) if best.chosen["cached"] else ()
        return (*start, *cached, *self.label_words, *self.split_words, *self.epoch_words)

    def as_demo(self, demo: Mapping[str, str | None], *, note: str) -> Comparison:
        """Return the same as the result of `tlc demo`, with `note` in the table's title."""
        return replace(self, demo=demo, summary=replace(self.summary, note=note))

    @property
    def latest_line(self) -> str:
        """The strategy that was finished last, on one line."""
        return result_line(self.summary.entries[-1])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc compare`, or `tlc demo`."""
        demo = {} if self.demo is None else {"demo": dict(self.demo)}
        return {**self.summary.to_json(), "bad": [item.to_json() for item in self.bad], **demo}

    def render(self) -> RenderableType:
        """Return the table for a terminal."""
        return terminal_table(self.summary)

    def _repr_html_(self) -> str:
        return html_table(self.summary)


def compare(
    data: str | Path,
    *,
    strategies: str = config.STRATEGIES,
    backbone: str | Sequence[str] = config.BACKBONE,
    weights: str = config.WEIGHTS,
    views: int | None = None,
    storage_dtype: config.StorageDtype = config.STORAGE_DTYPE,
    compute: config.Compute = config.COMPUTE,
    decode: config.Decode = config.DECODE,
    device: config.Device = config.DEVICE,
    engine: config.Engine = config.ENGINE,
    batch_size: int | None = None,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    on_bad: config.OnBad = config.ON_BAD,
    seed: int = config.SEED,
    seeds: int = config.SEEDS,
    epochs: int = config.EPOCHS,
    max_minutes: float | None = None,
    results: Path | str | None = None,
    fresh: bool = False,
    on_result: Callable[[Comparison], None] | None = None,
    on_estimate: OnEstimate = lambda label, seconds: None,
) -> Comparison:
    """Run strategies on the same good rows of DATA: all training rows for each, the reported ones read once.

    `strategies` are names joined by commas, `backbone` one name or several. Each strategy's result is kept under the
    cache folder's root as soon as it is there, and found again by a later call unless `fresh`; an interrupted call so
    goes on where it was. `on_result` is given the comparison so far after each strategy, and `results` is a JSON file
    that is replaced as often; `on_estimate` a strategy's label and the seconds it will still take, where it trains a
    network. What is estimated not to be over within `max_minutes` is left out and named; the extraction is not.

    Raises DataError, UsageError (unknown strategy or backbone), WeightsError, CacheError, ResourceError.
    """
    start = time.perf_counter()
    options = EmbedOptions(compute, storage_dtype, views, batch_size, workers, decode)
    chosen = pick_strategies(strategies)
    names = (backbone,) if isinstance(backbone, str) else tuple(dict.fromkeys(backbone))
    check_on_bad(on_bad)
    check_counts(seeds=seeds, epochs=epochs)
    if not names:
        raise UsageError("--backbone: name at least one")
    if max_minutes is not None and not max_minutes >= 0:  # NaN as well
        raise UsageError(f"--max-minutes {max_minutes}: must be a number that is not negative")
    choice, root = choose_engine(engine, device=device, compute=compute), cache_root(cache_dir)
    load = functools.cache(functools.partial(load_backbone, weights=weights))
    sources = {strategy.source for strategy in chosen}
    # Before anything is read: what cannot be loaded fails now.
    loaded = [load(name) for name in names] if sources & {Source.EMBEDDINGS, Source.BACKBONE} else []
    for network in loaded:
        pick_decoder(options.spec(network).preprocessing)
    watch = Stopwatch()
    finish = functools.partial(
        finish_manifest, labels=labels, val_fraction=val_fraction, split_seed=split_seed, watch=watch
    )
    manifest = _read(data, [options.spec(item) for item in loaded], root=root, finish=finish)
    if results is not None:
        check_writable(Path(results))  # hours of training must not end in a file that cannot be written
    extractor = Extractor(manifest, root, options, choice, watch.seconds()["hash"])
    extractions = {item.name: extractor.extract(item) for item in loaded} if Source.EMBEDDINGS in sources else {}
    reasons = _bad_rows(manifest, extractions, workers=workers)
    log_bad(bad_images(manifest, reasons), manifest.n_rows, on_bad=on_bad)
    rows, warnings = _rows_to_compare(manifest, reasons)
    # Once, as the network is traced for it.
    plan_activations = functools.cache(functools.partial(_plan_activations, manifest, root=root, options=options))
    settings = [
        Setting(
            rows=rows,
            backbone_name=name,
            backbone=functools.partial(load, name),
            random_backbone=functools.partial(load_backbone, name, weights=RANDOM),
            spec=options.spec,
            embeddings=functools.partial(extractions.__getitem__, name),
            activations=functools.partial(cache_activations, extractor),
            planned_activations=plan_activations,
            n_views=extractions[name].views if name in extractions else config.VIEWS,
            device=torch.device(choice.device),
            workers=workers,
            epochs=epochs,
        )
        for name in names
    ]
    jobs = plan_jobs(chosen, settings, seeds=range(seed, seed + seeds), folder=root / RESULTS_FOLDER, reuse=not fresh)
    done: list[Entry | LeftOut] = []
    draw = {"val_fraction": (val_fraction, config.VAL_FRACTION), "split_seed": (split_seed, config.SPLIT_SEED)}
    backbone_words = [] if names == (config.BACKBONE,) else [word for name in names for word in ("--backbone", name)]
    network_words = changed_words(
        weights=(weights, config.WEIGHTS),
        views=(views, None),
        compute=(compute, config.COMPUTE),
        decode=(decode, config.DECODE),
    )

    def comparison() -> Comparison:
        return Comparison(
            summary=_summarise(manifest.name, rows, jobs, done, warnings=warnings, device=choice.device_name),
            bad=bad_images(manifest, reasons),
            data=str(data),
            weights=weights,
            caches={name: extraction.cache for name, extraction in extractions.items()},
            label_words=changed_words(labels=(labels, None)),
            split_words=() if manifest.has_given_split else changed_words(**draw),
            epoch_words=changed_words(epochs=(epochs, config.EPOCHS)),
            cache_words=changed_words(cache_dir=(cache_dir, None), storage_dtype=(storage_dtype, config.STORAGE_DTYPE)),
            network_words=(*backbone_words, *network_words),
        )

    deadline = math.inf if max_minutes is None else start + 60 * max_minutes
    for item in run_jobs(jobs, deadline=deadline, on_estimate=on_estimate):
        done.append(item)
        if results is not None:
            write_atomic(Path(results), json.dumps(comparison().to_json(), allow_nan=False).encode())
        if on_result is not None and isinstance(item, Entry):
            on_result(comparison())
    return comparison()


def _read(data: str | Path, specs: Sequence[ExtractSpec], *, root: Path, finish: Callable[..., Manifest]) -> Manifest:
    """Scan DATA, and hash the files that no cache of it vouches for."""
    manifest = read_source(data)
    caches = [find(root, data_name=manifest.name, data_root=manifest.root, spec=spec) for spec in specs]
    known = {path: file for cache in caches for path, file in known_files(cache).items()}
    return finish(manifest, known=known)


def _plan_activations(
    manifest: Manifest, backbone: Backbone, stage: str, *, root: Path, options: EmbedOptions
) -> tuple[ExtractSpec, int]:
    """Return the spec of the activations where `stage` ends, and the views of each image that a cache has or will."""
    spec = options.spec(frozen_part(backbone, stage))
    folder = find(root, data_name=manifest.name, data_root=manifest.root, spec=spec)
    return spec, options.views or known_views(folder)


def _bad_rows(manifest: Manifest, extractions: Mapping[str, Extraction], *, workers: int | None) -> dict[int, str]:
    """Return {row: reason} of the images that some backbone cannot have; without extraction all are decoded for it."""
    if not extractions:
        return find_unreadable(manifest, workers=workers)
    reasons = {item.path: item.reason for extraction in extractions.values() for item in extraction.bad}
    return {row: reasons[path] for row, path in enumerate(manifest.paths) if path in reasons}


def _rows_to_compare(manifest: Manifest, reasons: Mapping[int, str]) -> tuple[ComparedRows, tuple[str, ...]]:
    """Return the rows, and warnings that name the classes and groups to beware of; these are logged too."""
    is_good = np.ones(manifest.n_rows, dtype=np.bool_)
    is_good[list(reasons)] = False
    warnings = check_trainable(manifest.subset(is_good))
    rows = select_rows(manifest, is_good=is_good)
    for warning in warnings:
        logger.warning("%s", warning)
    return rows, tuple(warnings)


def _summarise(
    data: str,
    rows: ComparedRows,
    jobs: Sequence[Job],
    done: Sequence[Entry | LeftOut],
    *,
    warnings: tuple[str, ...],
    device: str,
) -> Summary:
    labels = [item.label for item in done]
    return Summary(
        data=data,
        split=rows.reported,
        n_train=rows.n_train,
        n_reported=rows.n_reported,
        backbones=tuple(dict.fromkeys(job.setting.backbone_name for job in jobs if job.strategy.has_backbone)),
        entries=tuple(item for item in done if isinstance(item, Entry)),
        left_out=tuple(item for item in done if isinstance(item, LeftOut)),
        unfinished=tuple(job.label for job in jobs if job.label not in labels),
        straddling=rows.n_straddling,
        warnings=warnings,
        environment={**describe_environment(), "device": device},
    )
