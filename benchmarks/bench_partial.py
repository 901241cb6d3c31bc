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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_photos import make_photos
from torch.utils.flop_counter import FlopCounterMode
from training_side import CPU, forward_and_back, read_training, second_epoch, side_figures
from turns import in_turns, ratios, sgemm_gflops, spread

from transfercache.backbones.choice import choose_engine
from transfercache.backbones.cut import cut_after, stage_end
from transfercache.backbones.registry import Backbone, load_backbone, network_with_head
from transfercache.commands.boundary import cache_activations
from transfercache.commands.extract import Extractor
from transfercache.commands.inputs import EmbedOptions
from transfercache.environment import describe_environment
from transfercache.finetuning.activations import Activations, boundary_before
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.precision import training_compute
from transfercache.images.manifest import Manifest


def step_gflops(backbone: Backbone, stage: str) -> dict[str, float]:
    """Return the multiplications and additions of one image's step, in 1e9, of each side."""
    network = network_with_head(backbone, 2, seed=0).to("meta")
    before, behind = cut_after(network, stage_end(backbone, stage), name=backbone.name)
    crop = backbone.preprocessing.crop
    image = torch.zeros(1, 3, crop, crop, device="meta")
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        activation = before(image)
    trained = forward_and_back(behind, activation)
    return {
        "partial": trained,
        "on images": trained + frozen.get_total_flops() / 1e9,
        "full": forward_and_back(copy.deepcopy(network), image),
    }


def measure(
    manifest: Manifest, backbone: Backbone, activations: Activations, *, compute: str, repeats: int
) -> dict[str, Any]:
    """Return the figures of all sides in one precision."""
    plain = FinetuneOptions(epochs=2, augment="none", compute=compute, unfreeze=backbone.stages[-1].name)
    everything = FinetuneOptions(epochs=2, compute=compute)
    sides = {
        "sgemm": sgemm_gflops,
        "partial": partial(second_epoch, manifest, backbone, plain, activations),
        "on images": partial(second_epoch, manifest, backbone, plain),
        "full": partial(second_epoch, manifest, backbone, everything),
    }
    seconds = in_turns(sides, repeats=repeats)
    sgemm = seconds.pop("sgemm")
    gflops = step_gflops(backbone, activations.stage)
    figures: dict[str, Any] = {"compute": training_compute(compute, CPU)}
    for name, gflop in gflops.items():
        figures[name] = side_figures(seconds[name], sgemm, n_images=manifest.n_rows, gflop=gflop)
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
        extractor = Extractor(manifest, Path(folder) / "cache", EmbedOptions(), choose_engine(device="cpu"), 0.0)
        extraction, activations = cache_activations(extractor, backbone, boundary_before(backbone, last))
        made = {"seconds": round(extraction.record["seconds"], 2), "engine": extraction.engine}
        # `auto` is measured where it is something of its own.
        named = {training_compute(compute, CPU): compute for compute in reversed(given.compute.split(","))}
        by_compute = {
            compute: measure(manifest, backbone, activations, compute=compute, repeats=given.repeats)
            for compute in reversed(named.values())
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
