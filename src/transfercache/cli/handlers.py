"""One function a command: its words -> one call of the function of the same name -> printed result.

`locals()` comes first in each body, where it is the words alone. Commands are imported when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from transfercache import config
from transfercache.cli import options
from transfercache.cli.finetune_handler import finetune
from transfercache.cli.live import show_live
from transfercache.cli.output import call, finish_as_asked, run, show_line


def extract_features(
    data: options.Data,
    backbone: options.Backbone = config.BACKBONE,
    weights: options.Weights = config.WEIGHTS,
    boundary: Annotated[
        str,
        typer.Option(
            metavar="pooled|STAGE",
            help="Where features are taken; at a stage's end, for finetune --cached.",
            rich_help_panel="Backbone",
        ),
    ] = config.BOUNDARY,
    views: options.Views = None,
    storage_dtype: options.StorageDtype = config.STORAGE_DTYPE,
    max_bytes: options.MaxBytes = None,
    compute: options.Compute = config.COMPUTE,
    decode: options.Decode = config.DECODE,
    device: options.Device = config.DEVICE,
    engine: options.Engine = config.ENGINE,
    batch_size: options.ExtractBatchSize = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Embed the I-th of N slices, as one of a batch array; then run the same without --part.",
            show_default=False,
            rich_help_panel="Machine",
        ),
    ] = None,
    labels: options.Labels = None,
    val_fraction: options.ValFraction = config.VAL_FRACTION,
    split_seed: options.SplitSeed = config.SPLIT_SEED,
    verify_content: Annotated[
        bool,
        typer.Option(
            "--verify-content",
            help="Hash every file and prove every row, also those that look unchanged; what fails is made again.",
            rich_help_panel="Data",
        ),
    ] = False,
    on_bad: options.OnBad = config.ON_BAD,
    json: options.Json = False,
) -> int:
    """Run the frozen backbone once over DATA; its embeddings land in a cache. Finished rows are never recomputed."""
    return run("extract_features", locals(), on_engine=show_line)


def train_head(
    cache: Annotated[
        str, typer.Argument(metavar="CACHE|DATA", help="A cache folder, or the DATA of one.", show_default=False)
    ],
    solver: Annotated[
        str, typer.Option(help="logistic, ridge, linear, sklearn, or knn (which only evaluates).")
    ] = config.SOLVER,
    C: Annotated[
        str | None,
        typer.Option(
            "--C", metavar="auto|FLOAT", help="Inverse regularisation, of all but linear.", show_default=config.C
        ),
    ] = None,
    class_weight: Annotated[
        config.ClassWeight | None,
        typer.Option(help="Weight of a row's class.", show_default=config.CLASS_WEIGHT),
    ] = None,
    optimizer: Annotated[
        config.Optimizer | None,
        typer.Option(help="Of the linear solver.", show_default=config.OPTIMIZER),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit a temperature to held-out training images.")
    ] = False,
    suspects: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE.csv",
            help="Write the training labels there, the most suspicious first; edited, it fits --labels.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="Also train on K images a class, many times.", show_default=False),
    ] = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Also train on shares of the images: would more labels help?")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Above 1: also the mean and spread of so many seeds, from --seed on.")
    ] = config.SEEDS,
    repeats: Annotated[
        int, typer.Option(min=2, help="Draws of each size, for --shots and --learning-curve.")
    ] = config.REPEATS,
    backbone: options.Backbone = config.BACKBONE,
    weights: options.Weights = config.WEIGHTS,
    cache_dir: options.CacheDir = None,
    labels: options.Labels = None,
    val_fraction: options.NewValFraction = None,
    split_seed: options.NewSplitSeed = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Report the mean of an image's views (extract-features --views).")
    ] = False,
    seed: options.Seed = config.SEED,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Put the backbone into the MODEL: predict then needs no other weights.")
    ] = False,
    out: options.Out = None,
    json: options.Json = False,
) -> int:
    """Train a linear head on a cache in seconds; report it once on test, else val."""
    return run("train_head", locals())


def compare(
    data: options.Data,
    strategies: Annotated[
        str,
        typer.Option(
            help="Of knn, logistic, ridge, linear, partial, finetune, lp-ft, scratch, pixels-knn, tutorial-frozen, "
            "tutorial-finetune."
        ),
    ] = config.STRATEGIES,
    backbone: options.Backbones = [config.BACKBONE],  # noqa: B006 - typer hands out copies
    weights: options.Weights = config.WEIGHTS,
    views: options.Views = None,
    storage_dtype: options.StorageDtype = config.STORAGE_DTYPE,
    compute: options.Compute = config.COMPUTE,
    decode: options.Decode = config.DECODE,
    device: options.Device = config.DEVICE,
    engine: options.Engine = config.ENGINE,
    batch_size: options.ExtractBatchSize = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    labels: options.Labels = None,
    val_fraction: options.ValFraction = config.VAL_FRACTION,
    split_seed: options.SplitSeed = config.SPLIT_SEED,
    on_bad: options.OnBad = config.ON_BAD,
    seed: options.Seed = config.SEED,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each strategy, from --seed on.")] = config.SEEDS,
    epochs: Annotated[
        int, typer.Option(min=1, help="Of partial, finetune, lp-ft and scratch; the tutorial has its own.")
    ] = config.EPOCHS,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Leave out, by name, what would take longer.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            readable=False, metavar="PATH.json", help="Write the JSON document there as well.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what an earlier run has kept.")] = False,
    json: options.Json = False,
) -> int:
    """Compare strategies on the same rows: accuracy with its interval, and what each costs. Goes on where it was."""
    return _run_live("compare", locals())


def predict(
    model: Annotated[
        Path,
        typer.Argument(readable=False, metavar="MODEL", help="What train-head or finetune wrote.", show_default=False),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="PATH...|DATA|CACHE", help="Images, folders, DATA or a cache.", show_default=False),
    ],
    weights: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The backbone's weights, where they have moved.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to list an image.")] = config.TOP,
    tta: Annotated[bool, typer.Option("--tta", help="The mean over an image and its mirror image.")] = False,
    device: options.Device = config.DEVICE,
    engine: options.Engine = config.ENGINE,
    batch_size: options.ExtractBatchSize = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    on_bad: options.OnBad = config.ON_BAD,
    out: Annotated[
        Path | None,
        typer.Option(
            readable=False, metavar="FILE.csv|.jsonl", help="Stream the predictions there.", show_default=False
        ),
    ] = None,
    json: options.Json = False,
) -> int:
    """Label images with a MODEL; on a cache, or where one has the rows, no image is read."""
    return run("predict", locals())


def export(
    model: Annotated[
        Path,
        typer.Argument(readable=False, metavar="MODEL", help="What train-head or finetune wrote.", show_default=False),
    ],
    format: Annotated[
        config.ExportFormat,
        typer.Option(help="torchvision: a state_dict (.pth), tensors alone. onnx needs the extra onnx."),
    ] = config.EXPORT_FORMAT,
    out: Annotated[
        Path | None,
        typer.Option(readable=False, metavar="PATH", help="Where it is written.", show_default="beside the MODEL"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The backbone's weights, where they have moved.", show_default=False),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Compare the logits on these images too.", show_default=False),
    ] = None,
    json: options.Json = False,
) -> int:
    """Write a MODEL, backbone and head in one, for use without tlc; its logits are compared with tlc's own first."""
    return run("export", locals())


def demo(
    device: options.Device = config.DEVICE,
    cache_dir: options.CacheDir = None,
    seed: options.Seed = config.SEED,
    json: options.Json = False,
) -> int:
    """Compare strategies on the ants and bees of the tutorial, or, without a network, on handwritten digits."""
    return _run_live("demo", locals())


def doctor(json: options.Json = False) -> int:
    """Say what this machine can compute with, what would be faster, and where caches and weights lie."""
    return run("doctor", locals())


def _run_live(name: str, words: dict[str, Any]) -> int:
    with show_live() as callbacks:
        result = call(name, words, **callbacks)
    return finish_as_asked(result, words)


def register(app: typer.Typer) -> None:
    """Add every command to `app`, in the order in which a newcomer meets them."""
    for handler in (demo, extract_features, train_head, finetune, compare, predict, export, doctor):
        app.command()(handler)
