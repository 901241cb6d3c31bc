"""An epoch of training the last stage from cached activations, against the same on images, and against all stages.

Run: .venv/bin/python benchmarks/bench_partial.py [PHOTOGRAPHS] [--images 244] [--repeats 5] [--weights random|PATH]
     [--compute fp32,auto] [--backbone resnet18]
On crops of PHOTOGRAPHS (a folder a class), or on made images. `partial` trains from a cache, `on images` decodes and
runs the frozen stages anew, both without augmentation, so that their batches are the same; `full` trains all stages.
Each side is the second epoch of a run of two, at the default batch. `arithmetic` is the ratio of the multiplications
of a step, forward and back, counted as torch runs it; `of_arithmetic` is the measured ratio over that, above 1 where
decoding is saved as well; `of_sgemm` is a side's multiplications over what the machine's float32 matrix product would
do in the same time. The extraction is timed once, from nothing. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_photos import make_photos
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turns, ratios, sgemm_gflops, spread

from transfercache.backbones.choice import choose_engine
from transfercache.backbones.cut import cut_after, stage_end
from transfercache.backbones.registry import Backbone, load_backbone, network_with_head
from transfercache.commands.boundary import cache_activations
from transfercache.commands.inputs import EmbedOptions
from transfercache.environment import describe_environment
from transfercache.finetuning.activations import Activations, boundary_before
from transfercache.finetuning.loop import finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.precision import training_compute
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source
from transfercache.splits import Split

_CPU = torch.device("cpu")


def read_training(folder: Path) -> Manifest:
    """Return all images as training rows: nothing is reported, so that a run is its epochs."""
    manifest = hash_files(read_source(folder), known={}, scanned_ns=0)
    return replace(manifest, split=np.full(manifest.n_rows, Split.TRAIN, dtype=np.uint8))


def second_epoch(
    manifest: Manifest, backbone: Backbone, options: FinetuneOptions, activations: Activations | None
) -> float:
    """Return its seconds."""
    spec = EmbedOptions().spec(backbone)
    result = finetune(manifest, backbone, options=options, spec=spec, device=_CPU, activations=activations)
    return result.epochs[1].seconds


def step_gflops(backbone: Backbone, stage: str) -> dict[str, float]:
    """Return the multiplications and additions of one image's step, in 1e9, of each side."""
    network = network_with_head(backbone, 2, seed=0).to("meta")
    before, behind = cut_after(network, stage_end(backbone, stage), name=backbone.name)
    crop = backbone.preprocessing.crop
    image = torch.zeros(1, 3, crop, crop, device="meta")
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        activation = before(image)
    trained = _forward_and_back(behind, activation)
    return {
        "partial": trained / 1e9,
        "on images": (trained + frozen.get_total_flops()) / 1e9,
        "full": _forward_and_back(copy.deepcopy(network), image) / 1e9,
    }


def _forward_and_back(network: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(inputs).sum().backward()
    return int(counter.get_total_flops())


def measure(
    manifest: Manifest, backbone: Backbone, activations: Activations, *, compute: str, repeats: int
) -> dict[str, Any]:
    """Return the figures of all sides in one precision."""
    plain = FinetuneOptions(epochs=2, augment="none", compute=compute, unfreeze=backbone.stages[-1].name)
    everything = FinetuneOptions(epochs=2, compute=compute)
    rates: list[float] = []

    def rate() -> float:
        rates.append(sgemm_gflops())
        return 0.0

    sides = {
        "sgemm": rate,
        "partial": partial(second_epoch, manifest, backbone, plain, activations),
        "on images": partial(second_epoch, manifest, backbone, plain, None),
        "full": partial(second_epoch, manifest, backbone, everything, None),
    }
    seconds = in_turns(sides, repeats=repeats)
    sgemm = rates[-len(seconds["partial"]) :]
    gflops = step_gflops(backbone, activations.stage)
    figures: dict[str, Any] = {"compute": training_compute(compute, _CPU)}
    for name, gflop in gflops.items():
        n = manifest.n_rows
        figures[name] = {
            "seconds": spread(seconds[name]),
            "images_per_second": spread([n / s for s in seconds[name]]),
            "gflop_per_image": round(gflop, 3),
            "of_sgemm": spread([n * gflop / s / r for s, r in zip(seconds[name], sgemm, strict=True)]),
        }
    for name in ("on images", "full"):
        arithmetic = gflops[name] / gflops["partial"]
        measured = [other / own for other, own in zip(seconds[name], seconds["partial"], strict=True)]
        figures[f"partial against {name}"] = {
            "times_faster": ratios(seconds[name], seconds["partial"]),
            "arithmetic": round(arithmetic, 3),
            "of_arithmetic": spread([ratio / arithmetic for ratio in measured]),
        }
    return figures


def main(given: argparse.Namespace) -> None:
    """Make the images and the cache, and time the sides in turns."""
    backbone = load_backbone(given.backbone, weights=given.weights)
    last = FinetuneOptions(unfreeze=backbone.stages[-1].name, augment="none")
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_training(make_photos(Path(folder) / "images", given.images, source=given.photographs))
        extraction, activations = cache_activations(
            manifest,
            backbone,
            boundary_before(backbone, last),
            cache_dir=Path(folder) / "cache",
            options=EmbedOptions(),
            choice=choose_engine(device="cpu"),
            hash_seconds=0.0,
        )
        made = {"seconds": round(extraction.record["seconds"], 2), "engine": extraction.engine}
        by_compute = {
            compute: measure(manifest, backbone, activations, compute=compute, repeats=given.repeats)
            for compute in given.compute.split(",")
        }
    document = {
        "images": manifest.n_rows,
        "n": max(given.repeats, 1),
        "cached": activations.describe(),
        "extraction": made,
        "epoch": by_compute,
        "environment": describe_environment(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=244)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--compute", default="fp32,auto")
    parser.add_argument("--backbone", default="resnet18")
    main(parser.parse_args())
