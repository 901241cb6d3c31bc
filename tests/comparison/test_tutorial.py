from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.comparison import tutorial
from transfercache.comparison.strategy import Outcome
from transfercache.comparison.tutorial import (
    TutorialImages,
    eval_transform,
    make_loader,
    make_optimizer,
    train_transform,
)
from transfercache.errors import DataError
from transfercache.images.manifest import Manifest
from transfercache.randomness import derive_seed

from .conftest import read, write_photos

CPU = torch.device("cpu")
# The made images: 8 to train on and 6 reported.
TRAIN, REPORTED = np.arange(8), np.arange(8, 14)


@pytest.fixture(autouse=True)
def no_handler_left_behind() -> Iterator[None]:
    """torch's worker processes leave a handler of SIGCHLD, which every later subprocess of the tests would run."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def run(manifest: Manifest, backbone: Backbone, *, lr_backbone: float | None, workers: int = 0) -> Outcome:
    return tutorial.train_tutorial(
        manifest,
        backbone,
        train=TRAIN,
        reported=REPORTED,
        lr_backbone=lr_backbone,
        seed=3,
        device=CPU,
        workers=workers,
        on_epoch=lambda epoch, n_epochs: None,
    )


def losses_of(outcome: Outcome) -> list[float]:
    return [epoch["train_loss"] for epoch in outcome.chosen["by_epoch"]]


@pytest.fixture(autouse=True)
def two_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tutorial, "TUTORIAL_EPOCHS", 2)


class Indices(Dataset[int]):
    """Rows that are nothing but their numbers, which shows the order of a loader."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


class Plain:
    """The tutorial's loop again, written by itself: images opened by Pillow, v1 transforms, no DataLoader."""

    def __init__(self, manifest: Manifest, backbone: Backbone, *, lr_backbone: float | None) -> None:
        self.manifest = manifest
        self.pixels = backbone.preprocessing
        self.network = network_with_head(backbone, 2, seed=3)
        head = [self.network.fc.weight, self.network.fc.bias]
        rest = [p for p in self.network.parameters() if not any(p is own for own in head)]
        groups = [{"params": head, "lr": 1e-3}]
        if lr_backbone is None:
            for parameter in rest:
                parameter.requires_grad = False
        else:
            groups.append({"params": rest, "lr": lr_backbone})
        self.optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def image(self, row: int) -> Image.Image:
        return Image.open(self.manifest.root / self.manifest.paths[row]).convert("RGB")

    def to_input(self, image: Image.Image) -> torch.Tensor:
        tensor = transforms.functional.to_tensor(image)
        return transforms.functional.normalize(tensor, list(self.pixels.mean), list(self.pixels.std))

    def augmented(self, index: int, epoch: int) -> torch.Tensor:
        torch.manual_seed(derive_seed(3, "tutorial-augment", epoch, index))
        image = transforms.RandomResizedCrop(self.pixels.crop)(self.image(int(TRAIN[index])))
        return self.to_input(transforms.RandomHorizontalFlip()(image))

    def train(self, order: list[int], epoch: int) -> float:
        self.network.train()
        losses = []
        for batch in (order[:4], order[4:]):
            x = torch.stack([self.augmented(index, epoch) for index in batch])
            y = torch.tensor([int(self.manifest.labels[TRAIN[index]]) for index in batch])
            self.optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(self.network(x), y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))

    def probabilities(self) -> np.ndarray:
        self.network.eval()
        resized = [transforms.Resize(self.pixels.resize)(self.image(int(row))) for row in REPORTED]
        x = torch.stack([self.to_input(transforms.CenterCrop(self.pixels.crop)(image)) for image in resized])
        with torch.no_grad():
            return torch.softmax(self.network(x), dim=1).numpy()


@pytest.mark.parametrize("lr_backbone", [None, 1e-4])
def test_train_tutorial__equals_a_loop_written_by_itself(
    manifest: Manifest, backbone: Backbone, lr_backbone: float | None
) -> None:
    # The order is the DataLoader's own; everything else is not.
    indices = make_loader(Indices(), seed=3, workers=0)
    orders = [torch.cat(list(indices)).tolist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]
    plain = Plain(manifest, backbone, lr_backbone=lr_backbone)
    with torch.random.fork_rng(devices=[]):
        losses = [plain.train(order, epoch) for epoch, order in enumerate(orders, start=1)]
    result = run(manifest, backbone, lr_backbone=lr_backbone)
    np.testing.assert_allclose(losses_of(result), losses, rtol=1e-5)
    np.testing.assert_allclose(result.probabilities, plain.probabilities(), atol=1e-5)
    right = plain.probabilities().argmax(axis=1) == manifest.labels[REPORTED]
    assert result.chosen["by_epoch"][-1]["reported_accuracy"] == pytest.approx(right.mean())
    assert result.passes == 2 * 14
    assert set(result.seconds.stages) == {"train", "evaluate"}


def test_train_tutorial__same_bits_for_a_seed_and_with_worker_processes(manifest: Manifest, backbone: Backbone) -> None:
    before = torch.get_rng_state()
    first = run(manifest, backbone, lr_backbone=1e-4)
    again = run(manifest, backbone, lr_backbone=1e-4)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert losses_of(first) == losses_of(again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # what DataLoader does
def test_train_tutorial__worker_processes_change_no_bit(manifest: Manifest, backbone: Backbone) -> None:
    alone = run(manifest, backbone, lr_backbone=None)
    shared = run(manifest, backbone, lr_backbone=None, workers=2)
    np.testing.assert_array_equal(alone.probabilities, shared.probabilities)
    assert losses_of(alone) == losses_of(shared)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # what DataLoader does
@pytest.mark.parametrize("workers", [0, 2])
def test_train_tutorial__image_that_changed_meanwhile(backbone: Backbone, tmp_path: Path, workers: int) -> None:
    folder = write_photos(tmp_path / "photos", train=4, val=3)
    manifest = read(folder)
    (folder / "train" / "red" / "2.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        run(manifest, backbone, lr_backbone=None, workers=workers)
    changed = "it changed while it was being compared, run the same command again"
    assert str(caught.value) == f"train/red/2.png: empty file; {changed}"


def test_train_tutorial__backbone_stays_as_it_was(manifest: Manifest, backbone: Backbone) -> None:
    before = copy.deepcopy(backbone.network.state_dict())
    run(manifest, backbone, lr_backbone=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.network.parameters())


def test_train_epoch__frozen_backbone_keeps_its_weights_and_moves_its_statistics(
    manifest: Manifest, backbone: Backbone
) -> None:
    # The tutorial leaves batch norm in train mode even where nothing but the head is trained.
    network = network_with_head(backbone, 2, seed=0)
    optimizer = make_optimizer(network, "fc", lr_backbone=None)
    before = copy.deepcopy(network.state_dict())
    images = TutorialImages(manifest, TRAIN, train_transform(backbone.preprocessing), seed=0)
    batches = make_loader(images, seed=0, workers=0)
    tutorial.train_epoch(network, batches, optimizer, device=CPU, bar=tqdm(total=8, disable=True))
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"fc.weight", "fc.bias", "bn1.running_mean", "bn1.running_var"} <= moved
    assert not any(name.endswith((".weight", ".bias")) for name in moved - {"fc.weight", "fc.bias"})


def test_make_optimizer__groups_and_rates(backbone: Backbone) -> None:
    network = network_with_head(backbone, 2, seed=0)
    frozen = make_optimizer(network, "fc", lr_backbone=None)
    assert [(group["lr"], len(group["params"]), group["momentum"]) for group in frozen.param_groups] == [(1e-3, 2, 0.9)]
    both = make_optimizer(network, "fc", lr_backbone=1e-4)
    assert [(group["lr"], len(group["params"])) for group in both.param_groups] == [(1e-4, 60), (1e-3, 2)]


@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_transforms__size_scale_and_interpolation(
    backbone: Backbone, make: Callable[..., Callable[[Image.Image], torch.Tensor]]
) -> None:
    grey = Image.new("RGB", (70, 50), (124, 116, 104))  # about ImageNet's mean
    tensor = make(backbone.preprocessing)(grey)
    assert tensor.shape == (3, 32, 32)
    assert tensor.abs().max() < 0.01
    bicubic = replace(backbone.preprocessing, interpolation="bicubic")
    assert "interpolation=bicubic" in repr(make(bicubic))


def test_tutorial_images__augmentation_depends_on_epoch_and_row(manifest: Manifest, backbone: Backbone) -> None:
    images = TutorialImages(manifest, TRAIN, train_transform(backbone.preprocessing), seed=0)
    first, label = images[5]
    assert label == 1
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(images[5][0], first)
    assert not torch.equal(images[6][0], first)
    images.epoch = 1
    assert not torch.equal(images[5][0], first)
