"""The seed's two loops, as PyTorch's transfer-learning tutorial has them: batches of 4, 5 epochs, SGD, step decay.

Reproduced rather than improved, so that the other strategies are held against what people run: torchvision's
transforms in the order of the tutorial, NCHW memory, torch's own precision, batch norm in train mode during the
training phase (also where the backbone is frozen), and a pass over the reported split after each epoch.
https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from transfercache import config
from transfercache.arrays import Float64Array, Int64Array
from transfercache.backbones.devices import memory_errors, synchronize
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.backbones.weights import seeded
from transfercache.comparison.strategy import Outcome, uncached
from transfercache.errors import DataError, DecodeError
from transfercache.images.decode import load_image
from transfercache.images.manifest import Manifest
from transfercache.metrics import accuracy, predicted_classes
from transfercache.randomness import derive_seed
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

TUTORIAL_EPOCHS = 5
#: StepLR(step_size=7, gamma=0.1): with 5 epochs the rate never falls.
DECAY_EVERY, DECAY = 7, 0.1
#: The tutorial's worker processes; none where as many cores are not left over beside the network.
TUTORIAL_WORKERS = 4


class TutorialImages(Dataset[tuple[torch.Tensor, int]]):
    """Rows of a manifest through a transform of torchvision, whose draws depend on seed, epoch and row alone."""

    def __init__(
        self, manifest: Manifest, rows: Int64Array, transform: Callable[[Any], torch.Tensor], *, seed: int
    ) -> None:
        self.manifest = manifest
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[index])
        try:
            image = load_image(self.manifest.path_of(row), self.manifest.paths[row])
        except DecodeError as error:
            # All of them could be decoded before. Of an error's parts, torch brings one text out of a worker process.
            raise DataError(f"{error}; it changed while it was being compared, run the same command again") from error
        # torchvision's transforms draw from torch's global generator only.
        with seeded(derive_seed(self.seed, "tutorial-augment", self.epoch, index)):
            return self.transform(image), int(self.manifest.labels[row])


def train_tutorial(
    manifest: Manifest,
    backbone: Backbone,
    *,
    train: Int64Array,
    reported: Int64Array,
    lr_backbone: float | None,
    seed: int,
    device: torch.device,
    workers: int,
    on_epoch: Callable[[int, int], None],
) -> Outcome:
    """Run the loop on the manifest's rows `train` and report on `reported`; `lr_backbone` None freezes the backbone.

    `chosen` of the outcome has what the tutorial prints of each epoch: the mean loss over the images as they were
    trained on, and the accuracy on the reported ones. `backbone` stays as it was. `on_epoch` is told the epoch that is
    done, and how many there are. The same seed gives the same bits on the same machine's CPU, whatever `workers`.
    Raises ResourceError where the device has not the memory, DataError where an image cannot be decoded any more.
    """
    watch = Stopwatch()
    network = network_with_head(backbone, len(manifest.class_names), seed=seed).to(device)
    optimizer = make_optimizer(network, backbone.head_path, lr_backbone=lr_backbone)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=DECAY_EVERY, gamma=DECAY)
    augmented = TutorialImages(manifest, train, train_transform(backbone.preprocessing), seed=seed)
    batches = make_loader(augmented, seed=seed, workers=workers)
    evaluated = TutorialImages(manifest, reported, eval_transform(backbone.preprocessing), seed=seed)
    held_out = DataLoader(evaluated, batch_size=config.SEED_BATCH_SIZE, num_workers=workers)
    n_train_per_class = np.bincount(manifest.labels[train], minlength=len(manifest.class_names))
    losses, accuracies = [], []
    probabilities = np.zeros((0, 0))
    n_images = TUTORIAL_EPOCHS * (len(train) + len(reported))
    progress = tqdm(total=n_images, desc="tutorial", unit="img", leave=False, file=sys.stderr, disable=None)
    with progress as bar, seeded(derive_seed(seed, "dropout")), memory_errors(device), _worker_errors():
        for epoch in range(1, TUTORIAL_EPOCHS + 1):
            augmented.epoch = epoch
            with watch.stage("train"):
                losses.append(train_epoch(network, batches, optimizer, device=device, bar=bar))
                scheduler.step()
                synchronize(device)
            with watch.stage("evaluate"):
                probabilities = evaluate_epoch(network, held_out, device=device, bar=bar)
            predicted = predicted_classes(probabilities, n_train_per_class=n_train_per_class)
            accuracies.append(accuracy(manifest.labels[reported], predicted))
            on_epoch(epoch, TUTORIAL_EPOCHS)
    by_epoch = [
        {"train_loss": loss, "reported_accuracy": share} for loss, share in zip(losses, accuracies, strict=True)
    ]
    return Outcome(
        probabilities=probabilities,
        seconds=uncached(watch.seconds()),
        passes=n_images,
        chosen={"by": "last epoch", "by_epoch": by_epoch},
        best_on_reported={"accuracy": max(accuracies), "epoch": 1 + accuracies.index(max(accuracies))},
    )


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Give an error of a worker process its own words again, which torch puts behind the traceback there."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error


def make_optimizer(network: nn.Module, head_path: str, *, lr_backbone: float | None) -> torch.optim.SGD:
    """Return SGD on the head at the seed's rate and, unless `lr_backbone` is None (then it is frozen), on the rest."""
    head = list(network.get_submodule(head_path).parameters())
    trunk = [p for name, p in network.named_parameters() if not name.startswith(f"{head_path}.")]
    for parameter in trunk:
        parameter.requires_grad_(lr_backbone is not None)
    groups: list[dict[str, Any]] = [{"params": head, "lr": config.SEED_LR_HEAD}]
    if lr_backbone is not None:
        groups.insert(0, {"params": trunk, "lr": lr_backbone})
    return torch.optim.SGD(groups, momentum=config.MOMENTUM)


def make_loader(images: TutorialImages, *, seed: int, workers: int) -> DataLoader[tuple[torch.Tensor, int]]:
    """Return the shuffled batches of 4, the last one smaller."""
    order = torch.Generator().manual_seed(derive_seed(seed, "tutorial-order"))
    return DataLoader(images, batch_size=config.SEED_BATCH_SIZE, shuffle=True, num_workers=workers, generator=order)


def train_transform(preprocessing: Preprocessing) -> transforms.Compose:
    """RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    crop = transforms.RandomResizedCrop(preprocessing.crop, interpolation=interpolation)
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


def eval_transform(preprocessing: Preprocessing) -> transforms.Compose:
    """Resize, CenterCrop, ToTensor, Normalize."""
    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    resize = transforms.Resize(preprocessing.resize, interpolation=interpolation)
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    return transforms.Compose([resize, transforms.CenterCrop(preprocessing.crop), transforms.ToTensor(), normalise])


def train_epoch(
    network: nn.Module,
    batches: DataLoader[tuple[torch.Tensor, int]],
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    bar: tqdm[Any],
) -> float:
    """Take one step a batch in train mode; returns the mean loss over the images."""
    network.train()
    total, n_images = 0.0, 0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
        n_images += len(images)
        bar.update(len(images))
    return total / n_images


def evaluate_epoch(
    network: nn.Module, batches: DataLoader[tuple[torch.Tensor, int]], *, device: torch.device, bar: tqdm[Any]
) -> Float64Array:
    """Return the probabilities in eval mode, float64 [M, C], in the order of the rows."""
    network.eval()
    parts = []
    with torch.inference_mode():
        for images, _ in batches:
            parts.append(torch.softmax(network(images.to(device)).double(), dim=1).cpu())
            bar.update(len(images))
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)
