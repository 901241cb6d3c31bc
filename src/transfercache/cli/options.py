"""The options that several commands share, each described once.

No path is `readable`, here or in the handlers: typer would refuse with 2 what tlc's own errors say better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfercache import config

_DATA = typer.Argument(
    metavar="DATA",
    help="A folder (train/ and val/ of class folders, class folders, or flat), a .csv, 'hymenoptera' or 'digits'.",
    show_default=False,
)
Data = Annotated[str, _DATA]
DataUnlessDescribed = Annotated[str | None, _DATA]
Backbone = Annotated[
    str,
    typer.Option(
        help="A classification model of torchvision, efficientnet_lite0, or timm:NAME.", rich_help_panel="Backbone"
    ),
]
Backbones = Annotated[
    list[str],
    typer.Option(help="As of extract-features; may be given several times.", rich_help_panel="Backbone"),
]
Weights = Annotated[
    str,
    typer.Option(metavar="DEFAULT|PATH|random", help="Where the weights come from.", rich_help_panel="Backbone"),
]
Views = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=config.MAX_VIEWS,
        help="Rows an image: the eval transform, its mirror image, then drawn augmentations.",
        show_default="those the cache has, else 1",
        rich_help_panel="Backbone",
    ),
]
StorageDtype = Annotated[
    config.StorageDtype,
    typer.Option(
        help="Of the rows on the disk; auto is float32, of a stage's activations float16.", rich_help_panel="Backbone"
    ),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Refuse to write more than that, such as 500MB.",
        show_default=f"{config.MAX_BYTES} of a stage's activations, else no bound",
        rich_help_panel="Backbone",
    ),
]
Decode = Annotated[
    config.Decode,
    typer.Option(
        help="fast: JPEG by TorchCodec, within 2 grey levels (extra fast). draft: large JPEG shrunk as it is decoded.",
        rich_help_panel="Backbone",
    ),
]
Compute = Annotated[
    config.Compute,
    typer.Option(
        help="Precision; auto is fp32. bf16 needs AMX, AVX-512 BF16 or an NVIDIA GPU, fp16 an NVIDIA GPU.",
        rich_help_panel="Backbone",
    ),
]
Device = Annotated[config.Device, typer.Option(help="auto: a GPU where there is one.", rich_help_panel="Machine")]
Engine = Annotated[
    config.Engine,
    typer.Option(
        help="auto: on a CPU openvino where it is installed, else eager; compile is for NVIDIA GPUs.",
        rich_help_panel="Machine",
    ),
]
ExtractBatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images a batch; what does not fit into memory is computed in pieces.",
        show_default="32, on an NVIDIA GPU 256",
        rich_help_panel="Machine",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many decode. More than 8 are processes, where each gets 200 images. "
        "By default one a core, at most 8 threads or 16 processes.",
        show_default=False,
        rich_help_panel="Machine",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        envvar=config.CACHE_DIR_VARIABLE,
        help="Where caches live.",
        show_default=config.CACHE_DIR,
        rich_help_panel="Machine",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        metavar="FIXES.csv",
        help="path,label: replaces labels, by path.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
ValFraction = Annotated[
    float,
    typer.Option(min=0.0, max=0.9, help="Held out per class where DATA gives no split.", rich_help_panel="Data"),
]
SplitSeed = Annotated[int, typer.Option(help="The only thing that moves that split.", rich_help_panel="Data")]
NewValFraction = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.9,
        help="Draws the split anew, where DATA gives none.",
        show_default="the cache's own split",
        rich_help_panel="Data",
    ),
]
NewSplitSeed = Annotated[
    int | None,
    typer.Option(
        help="Draws the split anew, where DATA gives none.",
        show_default="the cache's own split",
        rich_help_panel="Data",
    ),
]
OnBad = Annotated[
    config.OnBad,
    typer.Option(help="Unreadable images: fail ends with 3 after all others are done.", rich_help_panel="Data"),
]
Seed = Annotated[int, typer.Option(help="Seeds folds, order and augmentation.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Out = Annotated[
    Path | None,
    typer.Option(readable=False, help="Where the MODEL is written.", show_default=f"under {config.MODELS_DIR}"),
]
