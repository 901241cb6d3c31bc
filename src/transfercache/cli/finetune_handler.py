"""The handler of `tlc finetune`, which has a file of its own for its many options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfercache import config
from transfercache.cli import options
from transfercache.cli.output import run, show_epoch, show_line
from transfercache.errors import UsageError

_RATES = "How it trains"
_INPUTS = "What it sees"
_RUN = "The run"
# What --describe takes into account.
_DESCRIBED = ("unfreeze", "optimizer", "lr_backbone", "lr_head", "lr_decay", "weight_decay", "batch_size", "json")


def finetune(
    data: options.DataUnlessDescribed = None,
    backbone: options.Backbone = config.BACKBONE,
    weights: options.Weights = config.WEIGHTS,
    init_head: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="MODEL",
            help="Start from a head that train-head made of this data and backbone, not from a new one.",
            show_default=False,
            rich_help_panel="Backbone",
        ),
    ] = None,
    unfreeze: Annotated[
        str,
        typer.Option(
            metavar="all|none|STAGES",
            help="What is trained beside the head; see --describe.",
            rich_help_panel="Backbone",
        ),
    ] = config.UNFREEZE,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached",
            help="Cache what the frozen stages before give, and train from that: no image is read again.",
            rich_help_panel=_INPUTS,
        ),
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=config.MAX_VIEWS,
            help="With --cached: as of extract-features; each epoch draws one an image.",
            show_default="those the cache has, else 1",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    storage_dtype: Annotated[
        config.StorageDtype,
        typer.Option(help="With --cached: of the activations; auto is float16.", rich_help_panel=_INPUTS),
    ] = config.STORAGE_DTYPE,
    max_bytes: options.MaxBytes = None,
    optimizer: Annotated[
        config.FinetuneOptimizer, typer.Option(help="sgd has momentum 0.9.", rich_help_panel=_RATES)
    ] = config.FINETUNE_OPTIMIZER,
    lr_backbone: Annotated[
        float | None,
        typer.Option(
            help="Of the last stage.",
            show_default="sgd: 1e-4 for batches of 4, scaled; adamw: 2e-4 for 32; a quarter with --init-head",
            rich_help_panel=_RATES,
        ),
    ] = None,
    lr_head: Annotated[
        float | None,
        typer.Option(
            help="Of the head.",
            show_default="sgd: 1e-3 for batches of 4, scaled; adamw: 4e-3 for 32; the backbone's with --init-head",
            rich_help_panel=_RATES,
        ),
    ] = None,
    lr_decay: Annotated[
        float,
        typer.Option(help="What a stage's rate is multiplied by for the stage before it.", rich_help_panel=_RATES),
    ] = config.LR_DECAY,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Not of biases and norms.", show_default="sgd: 0; adamw: 0.01", rich_help_panel=_RATES),
    ] = None,
    schedule: Annotated[
        config.Schedule, typer.Option(help="Of the learning rates.", rich_help_panel=_RATES)
    ] = config.SCHEDULE,
    warmup: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the run in which the rates rise.", rich_help_panel=_RATES)
    ] = config.WARMUP,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training rows.", rich_help_panel=_RATES)
    ] = config.EPOCHS,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images a step.", rich_help_panel=_RATES)
    ] = config.FINETUNE_BATCH_SIZE,
    batch_norm: Annotated[
        config.BatchNorm,
        typer.Option(help="frozen: all in eval mode; train: those of unfrozen stages train.", rich_help_panel=_RATES),
    ] = config.BATCH_NORM,
    augment: Annotated[
        config.Augment,
        typer.Option(
            help="crop: part of the image, mirrored or not; trivial: TrivialAugment too; none: as it is evaluated.",
            rich_help_panel=_INPUTS,
        ),
    ] = config.AUGMENT,
    crop_area: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of the image that a crop has at least.", rich_help_panel=_INPUTS),
    ] = config.CROP_AREA,
    mixup: Annotated[
        float, typer.Option(metavar="ALPHA", help="Mix images and labels in pairs; 0: not.", rich_help_panel=_INPUTS)
    ] = config.MIXUP,
    label_smoothing: Annotated[
        float, typer.Option(metavar="SHARE", help="Of a label given to all classes.", rich_help_panel=_INPUTS)
    ] = config.LABEL_SMOOTHING,
    ema: Annotated[
        str,
        typer.Option(
            metavar="none|DECAY", help="Keep the moving average of the network's weights.", rich_help_panel=_RATES
        ),
    ] = config.EMA,
    select: Annotated[
        str,
        typer.Option(
            metavar="none|FRACTION", help="Hold out training rows to choose the epoch on.", rich_help_panel=_RUN
        ),
    ] = config.SELECT,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --select: end after so many epochs without a better one.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="NAME=VALUE,...",
            help="Train all combinations on 4/5 of the training rows (see --select), then the best; repeatable.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    compute: Annotated[
        config.Compute,
        typer.Option(
            help="Precision of training; auto: bf16 where the hardware has units for it. Evaluation is in fp32.",
            rich_help_panel="Machine",
        ),
    ] = config.COMPUTE,
    device: options.Device = config.DEVICE,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    labels: options.Labels = None,
    val_fraction: options.ValFraction = config.VAL_FRACTION,
    split_seed: options.SplitSeed = config.SPLIT_SEED,
    on_bad: options.OnBad = config.ON_BAD,
    seed: options.Seed = config.SEED,
    out: options.Out = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the checkpoints of the same run, if any.", rich_help_panel=_RUN),
    ] = False,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="So many, beside the MODEL, while it trains.", rich_help_panel=_RUN)
    ] = config.KEEP_CHECKPOINTS,
    describe: Annotated[
        str | None,
        typer.Option(
            metavar="BACKBONE",
            help="Print its stages and what these options would train, and do nothing.",
            show_default=False,
            rich_help_panel="Backbone",
        ),
    ] = None,
    json: options.Json = False,
) -> int:
    """Train the backbone itself on the images, with augmentation and a learning rate per stage."""
    words = dict(locals())
    del words["describe"]
    if describe is not None:
        given = {name: words[name] for name in _DESCRIBED}
        return run("describe_backbone", {"backbone": describe, "has_head": init_head is not None, **given})
    if data is None:
        raise UsageError("finetune: DATA is missing; only --describe BACKBONE does without")
    from transfercache.commands.finetune import parse_tries

    words["grid"] = parse_tries(grid or [])
    return run("finetune", words, on_epoch=show_epoch, on_line=show_line)
