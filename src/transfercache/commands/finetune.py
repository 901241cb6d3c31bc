"""`tlc finetune`: train the backbone itself on the images, with a rate per parameter group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from transfercache import config
from transfercache.backbones.choice import choose_engine
from transfercache.backbones.devices import pick_device
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.commands.boundary import cache_activations
from transfercache.commands.extract import Extractor
from transfercache.commands.finetune_result import FinetuneOutcome, add_search, trials_to_json
from transfercache.commands.inputs import (
    BadImage,
    EmbedOptions,
    cache_root,
    changed_words,
    check_counts,
    check_on_bad,
    finish_manifest,
    log_bad,
)
from transfercache.errors import UsageError
from transfercache.files import check_writable
from transfercache.finetuning.activations import boundary_before
from transfercache.finetuning.checkpoints import SUFFIX, Checkpoints
from transfercache.finetuning.loop import Task, identify_run
from transfercache.finetuning.loop import finetune as train
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import EpochRecord, FinetuneResult
from transfercache.finetuning.search import (
    Trial,
    Values,
    check_effects,
    check_search,
    choose_trial,
    combine,
    search,
)
from transfercache.finetuning.training import OnEpoch, OnLine, ignore
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest, check_trainable
from transfercache.images.sources import read_source
from transfercache.metrics import Report, evaluate
from transfercache.models.card import CardData, save_card
from transfercache.models.head_file import Model, load_model, save_model
from transfercache.splits import Split, count_straddling
from transfercache.stopwatch import Stopwatch
from transfercache.text import name_flag

logger = logging.getLogger(__name__)

# With `cached` the activations are those at one stage, and no image is read.
_NOT_TRIED_CACHED = ("unfreeze", "augment", "crop_area")


def finetune(
    data: str | Path,
    *,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    init_head: Path | str | None = None,
    unfreeze: str = config.UNFREEZE,
    cached: bool = False,
    views: int | None = None,
    storage_dtype: config.StorageDtype = config.STORAGE_DTYPE,
    max_bytes: str | int | None = None,
    optimizer: config.FinetuneOptimizer = config.FINETUNE_OPTIMIZER,
    lr_backbone: float | None = None,
    lr_head: float | None = None,
    lr_decay: float = config.LR_DECAY,
    weight_decay: float | None = None,
    schedule: config.Schedule = config.SCHEDULE,
    warmup: float = config.WARMUP,
    epochs: int = config.EPOCHS,
    batch_size: int = config.FINETUNE_BATCH_SIZE,
    batch_norm: config.BatchNorm = config.BATCH_NORM,
    augment: config.Augment = config.AUGMENT,
    crop_area: float = config.CROP_AREA,
    mixup: float = config.MIXUP,
    label_smoothing: float = config.LABEL_SMOOTHING,
    ema: str | float = config.EMA,
    select: str | float = config.SELECT,
    patience: int | None = None,
    grid: Mapping[str, Sequence[object]] | None = None,
    compute: config.Compute = config.COMPUTE,
    device: config.Device = config.DEVICE,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    on_bad: config.OnBad = config.ON_BAD,
    seed: int = config.SEED,
    out: Path | str | None = None,
    resume: bool = False,
    keep_checkpoints: int = config.KEEP_CHECKPOINTS,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> FinetuneOutcome:
    """Fine-tune a backbone on the training rows of DATA, and report it once, on its test split, else val.

    `init_head` is a MODEL of `train_head` whose head is the start, in place of a new one. `unfreeze` is all, none, or
    stage names joined by commas. A rate or a weight decay that is None is the optimiser's: for SGD the tutorial's (1e-4
    for the backbone, 1e-3 for the head, at batches of 4), scaled linearly with `batch_size`; with `init_head` both are
    a quarter of the backbone's. The schedule is fixed and the last epoch is kept, unless `select` holds out that share
    of the training rows to choose the epoch on. Training is in bfloat16 where the hardware has units for it
    (`compute`), every figure on the reported split in float32.

    With `cached` the stages that train start from activations at the end of the one before them: of each image its
    `views` (see `extract_features`), of which every epoch draws one, in place of `augment`. They are taken from the
    cache under `cache_dir`, or made first, in float32, within `max_bytes`. The reported figures are of cached
    activations too, in `storage_dtype`; the MODEL is a whole network as ever.

    With `grid`, such as {"lr_head": [1e-3, 3e-3]}, every combination of these options trains first, with the same
    training rows held out: the share `select`, else `config.TRY_SHARE`. That of the lowest log loss on them is then
    trained as without `grid`, and it alone is reported.

    Checkpoints are in a folder beside `out` until the MODEL is written; those of an unfinished run are refused unless
    `resume` is set, and then the run goes on to the same MODEL. `on_epoch` is called after each epoch, those of trials
    too, `on_line` with a line on what it computes in, what it tries and where it goes on.

    Raises DataError, UsageError, WeightsError, ResourceError.
    """
    options = _read_options(locals())
    check_on_bad(on_bad)
    combinations = _combine(options, grid, cached=cached)
    check_counts(keep_checkpoints=keep_checkpoints)
    start = None if init_head is None else _read_head(Path(init_head))
    watch = Stopwatch()
    manifest = finish_manifest(
        read_source(data),
        watch=watch,
        known={},
        labels=labels,
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    for warning in check_trainable(manifest):
        logger.warning("%s", warning)
    loaded = load_backbone(backbone, weights=weights)
    stage = boundary_before(loaded, options) if cached else None
    check_effects(loaded, options, combinations)
    path = Path(out) if out is not None else Path(config.MODELS_DIR) / f"{manifest.name}-finetune.safetensors"
    check_writable(path)  # hours of training must not end in a file that cannot be written
    checkpoints = Checkpoints(path.with_name(path.name + SUFFIX), keep=keep_checkpoints, resume=resume)
    extraction = activations = None
    with checkpoints.held():
        check_search(checkpoints, combinations)
        if stage is not None:
            embed = EmbedOptions(storage_dtype=storage_dtype, views=views, workers=workers, max_bytes=max_bytes)
            choice, hashed = choose_engine(device=device), watch.seconds()["hash"]
            extractor = Extractor(manifest, cache_root(cache_dir), embed, choice, hashed)
            extraction, activations = cache_activations(extractor, loaded, stage, on_line=on_line)
        task = Task(loaded, EmbedOptions().spec(loaded), pick_device(device), start, activations)
        trials, result = _try_and_train(
            manifest, task, options, combinations, checkpoints, on_epoch=on_epoch or ignore, on_line=on_line or ignore
        )
        bad = {path for path, _ in result.bad}
        good = manifest.subset(np.array([path not in bad for path in manifest.paths]))
        outcome = FinetuneOutcome(
            model=path,
            groups=result.groups,
            compute=result.compute,
            epochs=result.epochs,
            chosen_epoch=result.chosen_epoch,
            n_train=result.head.n_train,
            straddling=count_straddling(good.split, good.labels, good.component),
            reported=report_finetuned(manifest, result),
            trials=trials,
            seconds=add_search(result.seconds, trials),
            backbone_passes=result.passes + sum(trial.passes for trial in trials),
            bad=tuple(BadImage(*item) for item in result.bad),
            data=str(data),
            extraction=None if extraction is None else {"cache": str(extraction.cache), **extraction.record},
        )
        _save(good, loaded, result, outcome)
        checkpoints.remove()
    log_bad(outcome.bad, manifest.n_rows, on_bad=on_bad)
    return outcome


def _read_options(given: Mapping[str, Any]) -> FinetuneOptions:
    """Return the options of training among all that `finetune` was given, under the same names."""
    augment = given["augment"]
    if given["cached"]:
        augment = _without_images(augment, given["crop_area"])
    else:
        _check_unused(given, views=None, storage_dtype="auto", max_bytes=None)
    named = {field.name: given[field.name] for field in fields(FinetuneOptions) if field.name in given}
    shares = {name: parse_share(name, given[name]) for name in ("ema", "select")}
    return FinetuneOptions(**{**named, **shares, "augment": augment})


def _try_and_train(
    manifest: Manifest,
    task: Task,
    options: FinetuneOptions,
    combinations: tuple[Values, ...],
    checkpoints: Checkpoints,
    *,
    on_epoch: OnEpoch,
    on_line: OnLine,
) -> tuple[tuple[Trial, ...], FinetuneResult]:
    """Return what was tried, if anything, and the run with the best of it, or with `options` alone."""

    def run(rows: Manifest, settings: FinetuneOptions, kept: Checkpoints) -> FinetuneResult:
        return train(rows, task, options=settings, checkpoints=kept, on_epoch=on_epoch, on_line=on_line)

    trials: tuple[Trial, ...] = ()
    if combinations:
        checkpoints.identity = identify_run(manifest, task, options)
        trials = search(run, manifest, options, combinations, checkpoints=checkpoints, on_line=on_line)
        options = replace(options, **choose_trial(trials).values)
    # After a search there is something to go on from, if not yet of this run.
    return trials, run(manifest, options, checkpoints.part("", is_first=not trials))


def _save(good: Manifest, backbone: Backbone, result: FinetuneResult, outcome: FinetuneOutcome) -> None:
    """Write the MODEL, and beside it its card, which tells of the `good` images alone."""
    model = Model(
        head=result.head,
        canary_logits=result.canary_logits,
        weights_source=backbone.weights_source,
        reported=None if outcome.reported is None else outcome.reported.to_json(),
        backbone_tensors=result.backbone_tensors,
    )
    save_model(model, outcome.model)
    save_card(
        outcome.model,
        model,
        CardData(good.name, good.digests, good.labels, good.split),
        seconds=outcome.seconds["total"],
        epochs=[asdict(epoch) for epoch in result.epochs],
        trials=trials_to_json(outcome.trials),
    )


def parse_tries(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the `grid` of words such as `lr-head=1e-3,3e-3`; raises UsageError naming the word that is off."""
    grid: dict[str, list[str]] = {}
    for word in words:
        flag, equals, values = word.partition("=")
        name = flag.replace("-", "_")
        if not equals:
            raise UsageError(f"--try {word}: must be an option and its values, such as lr-head=1e-3,3e-3")
        if name in grid:
            raise UsageError(f"--try {word}: {flag} is tried already; give all its values at once")
        grid[name] = values.split(",")
    return grid


def _combine(
    options: FinetuneOptions, grid: Mapping[str, Sequence[object]] | None, *, cached: bool
) -> tuple[Values, ...]:
    for name in _NOT_TRIED_CACHED if cached else ():
        if name in (grid or {}):
            raise UsageError(f"--try {name_flag(name)}: is not for --cached, where the activations are made once")
    return combine(options, grid) if grid else ()


def _without_images(augment: config.Augment, crop_area: float) -> config.Augment:
    """Return what `--augment` is where no image is read: by default none; boundary_before refuses the others."""
    if crop_area != config.CROP_AREA:
        raise UsageError(f"--crop-area {crop_area}: is of images, and with --cached none is read; leave it out")
    return "none" if augment == config.AUGMENT else augment


def _check_unused(given: Mapping[str, Any], **defaults: object) -> None:
    words = changed_words(**{name: (given[name], default) for name, default in defaults.items()})
    if words:
        raise UsageError(f"{' '.join(words)}: is of cached activations; pass --cached as well, or leave it out")


def report_finetuned(manifest: Manifest, result: FinetuneResult) -> Report | None:
    """Return the figures of a run on the rows that it evaluated; None where the data reports none."""
    rows = result.reported_rows
    if not len(rows):
        return None
    return evaluate(
        manifest.labels[rows],
        result.probabilities,
        class_names=manifest.class_names,
        n_train_per_class=result.n_train_per_class,
        split=Split(manifest.split[rows[0]]).name.lower(),
    )


def _read_head(path: Path) -> LinearHead:
    model = load_model(path)
    if model.is_finetuned:
        raise UsageError(f"--init-head {path}: its head fits the backbone in it alone; give a MODEL of train-head")
    return model.head


def parse_share(name: str, value: str | float) -> float | None:
    """Return the number of an option that may also be none; raises UsageError for another word."""
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"--{name} {value!r} must be none, or a number between 0 and 1") from error
