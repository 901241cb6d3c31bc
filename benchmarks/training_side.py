"""What the benchmarks of training share: images that all train, the seconds of an epoch, and a side's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from turns import spread

from transfercache.backbones.registry import Backbone
from transfercache.commands.inputs import EmbedOptions
from transfercache.finetuning.activations import Activations
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source
from transfercache.splits import Split

CPU = torch.device("cpu")


def read_training(folder: Path) -> Manifest:
    """Return all images as training rows: nothing is reported, so that a run is its epochs."""
    manifest = hash_files(read_source(folder), known={})
    return replace(manifest, split=np.full(manifest.n_rows, Split.TRAIN, dtype=np.uint8))


def second_epoch(
    manifest: Manifest, backbone: Backbone, options: FinetuneOptions, activations: Activations | None = None
) -> float:
    """Return its seconds."""
    task = Task(backbone, EmbedOptions().spec(backbone), CPU, activations=activations)
    return finetune(manifest, task, options=options).epochs[1].seconds


def forward_and_back(network: nn.Module, inputs: torch.Tensor) -> float:
    """Return the multiplications and additions of a step on `inputs`, in 1e9, as torch runs it."""
    with FlopCounterMode(display=False) as counter:
        network(inputs).sum().backward()
    return int(counter.get_total_flops()) / 1e9


def side_figures(seconds: Sequence[float], sgemm: Sequence[float], *, n_images: int, gflop: float) -> dict[str, Any]:
    """Return a side's figures; `sgemm` are the GFLOP/s of the machine's matrix product in the same rounds."""
    return {
        "seconds": spread(seconds),
        "images_per_second": spread([n_images / s for s in seconds]),
        "gflop_per_image": round(gflop, 3),
        "of_sgemm": spread([n_images * gflop / s / rate for s, rate in zip(seconds, sgemm, strict=True)]),
    }
