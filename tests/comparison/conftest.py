"""Made images whose classes are told apart by colour, the rows compared, and a backbone that takes milliseconds.

The backbone is ResNet-18 with random weights on images of 32 pixels; the embeddings are its own, computed directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfercache.backbones.cut import frozen_part
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.table import FeatureTable
from transfercache.comparison.results import RunResult, Seconds
from transfercache.comparison.rows import ComparedRows, load_pixels, select_rows
from transfercache.comparison.strategy import Setting
from transfercache.finetuning.activations import Activations
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source
from transfercache.images.transforms import eval_pixels
from transfercache.spec import ExtractSpec, Preprocessing

COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
PIXELS = Preprocessing(36, 32, "bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HERE = {"device": "a processor", "machine": {"cores": 2, "vector_units": "AVX2"}}
ELSEWHERE = {"device": "a graphics card", "machine": {"cores": 16, "vector_units": "AVX-512"}}
RUN = {**HERE, "date": "2026-11-01T10:00:00+00:00", "seconds": 12.0, "images": 14}
RECORD = {**RUN, "is_complete": True, "is_from_this_run": True, "runs": [RUN]}


def write_photos(folder: Path, **per_split: int) -> Path:
    """Write `<split>/<class>/<number>.png`, n of each class: 40 x 48 pixels of one colour under noise of their own."""
    for number, (split, n_images) in enumerate(per_split.items()):
        for label, (name, colour) in enumerate(COLOURS.items()):
            (folder / split / name).mkdir(parents=True)
            for index in range(n_images):
                noise = np.random.default_rng(1000 * number + 100 * label + index).normal(0, 40, (48, 40, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def read(folder: Path) -> Manifest:
    """The manifest with content digests, as the commands hand it over."""
    return hash_files(read_source(folder), known={})


def rows_of(manifest: Manifest) -> ComparedRows:
    """All of them, none being bad."""
    return select_rows(manifest, is_good=np.ones(manifest.n_rows, dtype=np.bool_))


def spec_of(backbone: Backbone) -> ExtractSpec:
    return ExtractSpec(backbone.name, backbone.weights_digest, backbone.boundary, backbone.preprocessing)


@dataclass(frozen=True, eq=False)
class MadeEmbeddings:
    """What a cache would give, computed at once."""

    contents: FeatureTable
    record: Mapping[str, Any]

    def table(self) -> FeatureTable:
        return self.contents


def embed(manifest: Manifest, backbone: Backbone) -> FeatureTable:
    """The features of all rows of a manifest, as a cache holds them."""
    pixels = load_pixels(manifest, partial(eval_pixels, preprocessing=backbone.preprocessing), workers=1)
    return FeatureTable(
        blocks=ArrayBlocks(EagerEngine(backbone, torch.device("cpu")).embed(pixels)),
        labels=manifest.labels,
        split=manifest.split,
        view=np.zeros(manifest.n_rows, dtype=np.uint8),
        group=manifest.component,
        row=np.arange(manifest.n_rows),
        class_names=manifest.class_names,
        spec=spec_of(backbone),
        paths=manifest.paths,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On images this small, threads spend their time waiting for each other, and all of it where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return replace(load_backbone("resnet18", weights="random"), preprocessing=PIXELS)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("compared") / "photos", train=4, val=3)


@pytest.fixture(scope="session")
def manifest(photos: Path) -> Manifest:
    return read(photos)


MakeSetting = Callable[..., Setting]


@pytest.fixture(scope="session")
def make_setting(backbone: Backbone) -> MakeSetting:
    """Return a function from a manifest to its setting, with one epoch of fine-tuning."""

    def make(manifest: Manifest, **changes: Any) -> Setting:
        setting = Setting(
            rows=rows_of(manifest),
            backbone_name="resnet18",
            backbone=lambda: backbone,
            random_backbone=lambda: backbone,
            spec=spec_of,
            embeddings=lambda: MadeEmbeddings(embed(manifest, backbone), RECORD),
            activations=lambda backbone, stage: (
                MadeEmbeddings(embed(manifest, backbone), RECORD),
                Activations(stage, embed(manifest, frozen_part(backbone, stage)), {}),
            ),
            planned_activations=lambda backbone, stage: (spec_of(frozen_part(backbone, stage)), 1),
            n_views=1,
            device=torch.device("cpu"),
            workers=1,
            epochs=1,
        )
        return replace(setting, **changes)

    return make


@pytest.fixture(scope="session")
def setting(make_setting: MakeSetting, manifest: Manifest) -> Setting:
    return make_setting(manifest)


def make_result(predicted: list[int], **changes: Any) -> RunResult:
    """A result on rows 10, 11, ... whose targets are 0, 1, 0, 1, ..., predicting as told with probability 0.75."""
    n_rows = len(predicted)
    probabilities = np.full((n_rows, 2), 0.25)
    probabilities[np.arange(n_rows), predicted] = 0.75
    result = RunResult(
        strategy="knn",
        backbone="resnet18",
        seed=0,
        split="val",
        class_names=("blue", "red"),
        n_train_per_class=np.array([5, 3]),
        row=np.arange(10, 10 + n_rows),
        target=np.arange(n_rows) % 2,
        probabilities=probabilities,
        seconds=Seconds(12.5, 0.5, {"extract": 12.0, "fit": 0.5}),
        backbone_passes=14,
        chosen={"neighbours": 5},
        best_on_reported=None,
        extraction=RECORD,
        environment=HERE,
        date="2026-11-25T09:00:00+00:00",
        tlc_version="0.1.0",
    )
    return replace(result, **changes)
