"""Fine-tuning on images at its defaults, against the loop of PyTorch's transfer-learning tutorial as it stands there.

Run: .venv/bin/python benchmarks/bench_finetune.py [PHOTOGRAPHS] [--weights random|PATH] [--images 244] [--repeats 5]
     [--seeds 5] [--workers 0] [--pixels 224]
On crops of PHOTOGRAPHS (a folder a class), or on made images; ResNet-18, all of which trains. The sides take turns:

tutorial        batches of 4, NCHW, float32, batch norm in train mode, SGD; torch and torchvision alone
fp32, bf16      tlc's own training at its defaults, bf16 where the processor has units for it

`resident` are steps alone: the images lie in memory, for the tutorial as normalised float32 in batches of 4, for tlc as
uint8, so that normalising them is in its time. `end_to_end` is the second epoch of a run of two: decoding, augmentation
and steps, nothing evaluated; the tutorial loads by a DataLoader with `workers` processes (none was the fastest on two
cores, docs/statistics.md), tlc in threads. `times_faster` is over the tutorial, `of_sgemm` the multiplications of
forward and back over what the machine's float32 matrix product would do in the same time, also for bf16. `accuracy`,
where PHOTOGRAPHS have a val or test split, is that of whole runs on them at the default epochs, a seed each. Prints one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_photos import make_photos
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from training_side import CPU, forward_and_back, read_training, second_epoch, side_figures
from turns import in_turns, ratios, sgemm_gflops, timed

from transfercache.backbones.available import bf16_units
from transfercache.backbones.choice import available_computes
from transfercache.backbones.engines import full_float32, normalise
from transfercache.backbones.registry import Backbone, load_backbone, network_with_head
from transfercache.commands.inputs import EmbedOptions
from transfercache.environment import describe_environment
from transfercache.finetuning.batches import Batch, ImageReader
from transfercache.finetuning.groups import describe_groups
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.trainer import build_trainer
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source
from transfercache.metrics import accuracy, predicted_classes
from transfercache.spec import Preprocessing
from transfercache.splits import divide_roles
from transfercache.stopwatch import Stopwatch

TUTORIAL_BATCH = 4
TutorialBatch = tuple[torch.Tensor, torch.Tensor]  # float32 [4, 3, H, W], int64 [4]


class Tutorial:
    """The tutorial's network, optimiser and training phase."""

    def __init__(self, weights: Mapping[str, torch.Tensor], n_classes: int) -> None:
        self.network = resnet18()
        self.network.load_state_dict(weights, strict=False)  # all but the head
        self.network.fc = nn.Linear(self.network.fc.in_features, n_classes)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.001, momentum=0.9)

    def train(self, batches: Iterable[TutorialBatch]) -> None:
        """Take a step a batch."""
        self.network.train()
        running_loss, running_corrects = 0.0, torch.tensor(0)
        for inputs, labels in batches:
            self.optimizer.zero_grad()
            outputs = self.network(inputs)
            _, predicted = torch.max(outputs, 1)
            loss = cross_entropy(outputs, labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item() * inputs.size(0)
            running_corrects += torch.sum(predicted == labels)


def tutorial_loader(folder: Path, pixels: Preprocessing, *, workers: int) -> DataLoader[TutorialBatch]:
    """Return the tutorial's batches of the images in `folder`."""
    augment = (RandomResizedCrop(pixels.crop), RandomHorizontalFlip(), ToTensor(), Normalize(pixels.mean, pixels.std))
    return DataLoader(
        ImageFolder(folder, Compose(augment)), batch_size=TUTORIAL_BATCH, shuffle=True, num_workers=workers
    )


def tutorial_second_epoch(weights: Mapping[str, torch.Tensor], batches: DataLoader[TutorialBatch], n: int) -> float:
    """Return its seconds, with a new head of `n` classes."""
    tutorial = Tutorial(weights, n)
    tutorial.train(batches)
    return timed(lambda: tutorial.train(batches))


def training_steps(manifest: Manifest, backbone: Backbone, batches: list[Batch], compute: str) -> Callable[[], None]:
    """Return what takes tlc's step on each of `batches`."""
    options = FinetuneOptions(compute=compute)
    n_classes = len(manifest.class_names)
    trainer = build_trainer(
        network_with_head(backbone, n_classes, seed=options.seed),
        backbone,
        describe_groups(backbone, options, n_classes=n_classes),
        prepare=partial(normalise, preprocessing=backbone.preprocessing),
        options=options,
        compute=compute,
        device=CPU,
    )
    trainer.set_training()

    def run() -> None:
        with full_float32():
            for batch in batches:
                trainer.step(batch, manifest.labels[batch.rows], epoch=1, progress=0.0)

    return run


def resident_sides(manifest: Manifest, backbone: Backbone, computes: list[str]) -> dict[str, Callable[[], float]]:
    """Return what steps once over the training images, on the same pixels, in seconds."""
    reader = ImageReader(FinetuneOptions(), Stopwatch(), manifest, backbone.preprocessing)
    batches = list(reader.training_batches(np.arange(manifest.n_rows), epoch=1))
    inputs = torch.cat([normalise(torch.from_numpy(batch.inputs), backbone.preprocessing) for batch in batches])
    labels = torch.cat([torch.from_numpy(manifest.labels[batch.rows]) for batch in batches])
    by_four = list(zip(inputs.contiguous().split(TUTORIAL_BATCH), labels.split(TUTORIAL_BATCH), strict=True))
    tutorial = Tutorial(backbone.network.state_dict(), len(manifest.class_names))
    steps = {name: training_steps(manifest, backbone, batches, name) for name in computes}
    return {"tutorial": lambda: timed(lambda: tutorial.train(by_four))} | {
        name: partial(timed, run) for name, run in steps.items()
    }


def end_to_end_sides(
    folder: Path, manifest: Manifest, backbone: Backbone, computes: list[str], *, workers: int
) -> dict[str, Callable[[], float]]:
    """Return what trains for two epochs from the files, in seconds of the second."""
    loader = tutorial_loader(folder, backbone.preprocessing, workers=workers)
    weights = backbone.network.state_dict()
    sides = {"tutorial": partial(tutorial_second_epoch, weights, loader, len(manifest.class_names))}
    for compute in computes:
        sides[compute] = partial(second_epoch, manifest, backbone, FinetuneOptions(epochs=2, compute=compute))
    return sides


def compare(sides: dict[str, Callable[[], float]], *, repeats: int, n_images: int, gflop: float) -> dict[str, Any]:
    """Return the figures of each side, and how many times faster than the tutorial's it is, round by round."""
    seconds = in_turns({"sgemm": sgemm_gflops, **sides}, repeats=repeats)
    sgemm = seconds.pop("sgemm")
    figures = {name: side_figures(taken, sgemm, n_images=n_images, gflop=gflop) for name, taken in seconds.items()}
    for name in figures.keys() - {"tutorial"}:
        figures[name]["times_faster"] = ratios(seconds["tutorial"], seconds[name])
    return figures


def measure_accuracy(manifest: Manifest, backbone: Backbone, computes: list[str], *, seeds: int) -> dict[str, Any]:
    """Return the accuracy on the reported images of a run for each seed, in each precision."""
    figures: dict[str, Any] = {}
    for compute in computes:
        by_seed = []
        for seed in range(seeds):
            options = FinetuneOptions(compute=compute, seed=seed)
            result = finetune(manifest, Task(backbone, EmbedOptions().spec(backbone), CPU), options=options)
            predicted = predicted_classes(result.probabilities, n_train_per_class=result.n_train_per_class)
            by_seed.append(accuracy(manifest.labels[result.reported_rows], predicted))
        figures[compute] = {"mean": statistics.mean(by_seed), "by_seed": by_seed}
        figures["reported_images"] = len(result.reported_rows)
    if "bf16" in figures:
        figures["bf16_less_fp32"] = figures["bf16"]["mean"] - figures["fp32"]["mean"]
    return figures


def main(given: argparse.Namespace) -> None:
    """Make the images, time the sides in turns, and train on the photographs themselves."""
    backbone = load_backbone("resnet18", weights=given.weights)
    pixels = replace(backbone.preprocessing, resize=round(given.pixels * 256 / 224), crop=given.pixels)
    backbone = replace(backbone, preprocessing=pixels)
    computes = [name for name in ("fp32", "bf16") if name in available_computes("cpu")]
    with tempfile.TemporaryDirectory() as name:
        folder = make_photos(Path(name), given.images, source=given.photographs)
        manifest = read_training(folder)
        network = network_with_head(backbone, len(manifest.class_names), seed=0).to("meta")
        gflop = forward_and_back(network, torch.zeros(1, 3, pixels.crop, pixels.crop, device="meta"))
        measure = partial(compare, repeats=given.repeats, n_images=manifest.n_rows, gflop=gflop)
        resident = measure(resident_sides(manifest, backbone, computes))
        end_to_end = measure(end_to_end_sides(folder, manifest, backbone, computes, workers=given.workers))
    document = {
        "images": given.images,
        "n": max(given.repeats, 1),
        "bf16_units": ", ".join(bf16_units()) or "none: bf16 is left out",
        "workers": given.workers,
        "resident": resident,
        "end_to_end": end_to_end,
    }
    if given.photographs and given.seeds:
        photographs = hash_files(read_source(given.photographs), known={})
        if divide_roles(photographs.split, photographs.labels).reported is not None:
            document["accuracy"] = measure_accuracy(photographs, backbone, computes, seeds=given.seeds)
    print(json.dumps({**document, "environment": describe_environment()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--images", type=int, default=244)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="0 leaves the accuracy out")
    parser.add_argument("--workers", type=int, default=0, help="processes of the tutorial's DataLoader")
    parser.add_argument("--pixels", type=int, default=224)
    main(parser.parse_args())
