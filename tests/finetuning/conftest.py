"""Made image folders whose classes are told apart by colour, and a backbone of two stages that takes milliseconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.backbones.stages import Stage
from transfercache.backbones.weights import seeded
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source
from transfercache.spec import ExtractSpec, Preprocessing

COLOURS = {"green": (20, 200, 30), "red": (210, 30, 20)}
PIXELS = Preprocessing(
    resize=36, crop=32, interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def write_image(path: Path, colour: tuple[int, int, int], *, seed: int) -> None:
    """A 40 x 48 PNG of one colour under noise that differs from file to file."""
    noise = np.random.default_rng(seed).integers(-15, 16, (48, 40, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


MakePhotos = Callable[..., Path]


@pytest.fixture
def make_photos(tmp_path: Path) -> MakePhotos:
    """Return a function that writes `<split>/<class>/<number>.png` for n images of each class."""

    def make(**per_split: int) -> Path:
        for number, (split, n_images) in enumerate(sorted({"train": 0, "val": 0, **per_split}.items())):
            for label, (name, colour) in enumerate(COLOURS.items()):
                (tmp_path / "photos" / split / name).mkdir(parents=True)
                for index in range(n_images):
                    seed = 1000 * number + 100 * label + index
                    write_image(tmp_path / "photos" / split / name / f"{index}.png", colour, seed=seed)
        return tmp_path / "photos"

    return make


def read(folder: Path) -> Manifest:
    """The manifest with content digests, as the commands hand it over."""
    return hash_files(read_source(folder), known={})


class TwoStages(nn.Module):
    """Convolution, batch norm and dropout in each stage, and a batch norm on the pooled features.

    In train mode that last one has no variance over a batch of one image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, 8, 3, 4), norm=nn.BatchNorm2d(8), act=nn.ReLU(), drop=nn.Dropout(0.2))
        )
        self.stage2 = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(8, 16, 3, 2),
                act=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                norm=nn.BatchNorm1d(16),
                drop=nn.Dropout(0.2),
            )
        )
        self.fc = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc(self.stage2(self.stage1(images)))
        return output


@pytest.fixture
def two_stages() -> Backbone:
    """A backbone with the stages stage1 and stage2, 16 features, 32 px."""
    with seeded(1):
        network = TwoStages().eval()
    return Backbone(
        name="two_stages",
        network=network,
        dim=16,
        classifier=None,
        head_path="fc",
        preprocessing=PIXELS,
        weights_digest="0" * 64,
        weights_source={"kind": "random", "where": "seed 1", "licence": "none needed"},
        stages=(Stage("stage1", "stage1"), Stage("stage2", "stage2")),
    )


@pytest.fixture(scope="session")
def resnet18() -> Backbone:
    """Random weights and 32 px instead of 224: all of the architecture, a fiftieth of the work."""
    return replace(load_backbone("resnet18", weights="random"), preprocessing=PIXELS)


def spec_of(backbone: Backbone) -> ExtractSpec:
    """The spec of this backbone's pooled features."""
    return ExtractSpec(backbone.name, backbone.weights_digest, "pooled", backbone.preprocessing)


def copied_state(network: nn.Module) -> Mapping[str, torch.Tensor]:
    """A state_dict that later steps do not change."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
