"""The loss after a first epoch of fine-tuning, from a new head and from the head that the cache has trained (LP-FT).

Run: .venv/bin/python benchmarks/bench_lp_ft.py [PHOTOGRAPHS] [--images 2000] [--pixels 64] [--seeds 5]
     [--weights random|PATH]
On crops of PHOTOGRAPHS (a folder a class), or on made stripes of ten directions; ResNet-18, a fifth of the images held
out. `held_out_loss` is the log loss there after the epoch, `training_loss` the mean over its steps. The rates are the
defaults, held constant, as in the first epoch of a long run. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from made_photos import make_photos
from PIL import Image
from sklearn.metrics import log_loss

from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.table import FeatureTable
from transfercache.commands.inputs import EmbedOptions
from transfercache.comparison.rows import load_pixels
from transfercache.environment import describe_environment
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult
from transfercache.heads.fit import fit_head
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest, hash_files, split_rows
from transfercache.images.sources import read_source
from transfercache.images.transforms import eval_pixels
from transfercache.randomness import derive_rng
from transfercache.splits import Split

_DIRECTIONS = 10
_BATCH = 128


def make_stripes(folder: Path, n_images: int, *, pixels: int) -> Path:
    """Write stripes of a class's direction, drawn in width, phase, colours and noise, as PNG."""
    row, column = np.mgrid[:pixels, :pixels]
    for number in range(n_images):
        rng = derive_rng(0, "stripes", number)
        angle = np.pi * (number % _DIRECTIONS) / _DIRECTIONS
        wave = np.sin((np.cos(angle) * row + np.sin(angle) * column) * rng.uniform(0.3, 1.2) + rng.uniform(0, 6.3))
        colours = rng.uniform(0, 255, (2, 3))
        image = (
            colours[0]
            + (colours[1] - colours[0]) * (0.5 + 0.5 * wave[:, :, None])
            + rng.normal(0, 60, (*wave.shape, 1))
        )
        path = folder / f"class {number % _DIRECTIONS}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def read_split(folder: Path) -> Manifest:
    """Return the images, a fifth of them held out."""
    return split_rows(hash_files(read_source(folder), known={}), val_fraction=0.2, split_seed=0)


def embed(manifest: Manifest, backbone: Backbone) -> npt.NDArray[np.float32]:
    """Return the embeddings of all rows, float32 [N, D]."""
    pixels = load_pixels(manifest, partial(eval_pixels, preprocessing=backbone.preprocessing), workers=None)
    engine = EagerEngine(backbone, torch.device("cpu"))
    return np.concatenate([engine.embed(pixels[i : i + _BATCH]) for i in range(0, len(pixels), _BATCH)])


def training_table(manifest: Manifest, backbone: Backbone, embeddings: npt.NDArray[np.float32]) -> FeatureTable:
    """Return the training rows as a cache would give them."""
    table = FeatureTable(
        blocks=ArrayBlocks(embeddings),
        labels=manifest.labels,
        split=manifest.split,
        view=np.zeros(manifest.n_rows, dtype=np.uint8),
        group=manifest.component,
        row=np.arange(manifest.n_rows),
        class_names=manifest.class_names,
        spec=EmbedOptions().spec(backbone),
        paths=manifest.paths,
    )
    return table.subset(table.split == Split.TRAIN)


def first_epoch(manifest: Manifest, backbone: Backbone, *, seed: int, start: LinearHead | None) -> dict[str, float]:
    """Return the losses of one epoch at the default rates."""
    result: FinetuneResult = finetune(
        manifest,
        Task(backbone, EmbedOptions().spec(backbone), torch.device("cpu"), start),
        options=FinetuneOptions(epochs=1, schedule="constant", seed=seed),
    )
    labels = manifest.labels[result.reported_rows]
    return {
        "training_loss": round(result.epochs[0].train_loss, 4),
        "held_out_loss": round(
            float(log_loss(labels, result.probabilities, labels=range(len(manifest.class_names)))), 4
        ),
        "held_out_accuracy": round(float((result.probabilities.argmax(axis=1) == labels).mean()), 4),
    }


def main(given: argparse.Namespace) -> None:
    """Make the images, train the head, and fine-tune from both starts, seed by seed."""
    backbone = load_backbone("resnet18", weights=given.weights)
    pixels = replace(backbone.preprocessing, resize=given.pixels, crop=given.pixels)
    backbone = replace(backbone, preprocessing=pixels)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "images"
        if given.photographs:
            make_photos(where, given.images, source=given.photographs)
        else:
            make_stripes(where, given.images, pixels=given.pixels)
        manifest = read_split(where)
        table = training_table(manifest, backbone, embed(manifest, backbone))
        seeds = []
        for seed in range(given.seeds):
            head = fit_head(table, seed=seed)
            sides = {"finetune": None, "lp-ft": head}
            runs = {name: first_epoch(manifest, backbone, seed=seed, start=head) for name, head in sides.items()}
            seeds.append({"seed": seed, **runs})
    lower = [runs["lp-ft"]["held_out_loss"] < runs["finetune"]["held_out_loss"] for runs in seeds]
    document = {
        "images": given.images,
        "pixels": given.pixels,
        "n": given.seeds,
        "lp_ft_is_lower": sum(lower),
        "seeds": seeds,
        "environment": describe_environment(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights", default="random")
    main(parser.parse_args())
