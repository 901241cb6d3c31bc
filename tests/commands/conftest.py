from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfercache.commands.extract import Extraction, extract_features


def write_photos(folder: Path, names: list[str], *, first_seed: int = 0) -> Path:
    """Small noisy images; those whose name holds "dog" are brighter than the others."""
    for seed, name in enumerate(names, first_seed):
        low = 90 if "dog" in name else 20
        pixels = np.random.default_rng(seed).integers(low, low + 140, (8, 9, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def draw_photos() -> Callable[..., Path]:
    return write_photos


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of eight cats and eight dogs; never to be changed."""
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(8)]
    return write_photos(tmp_path_factory.mktemp("data") / "pets", names)


@pytest.fixture(scope="session")
def extraction(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """The cache of `pets`; never to be changed."""
    return extract_features(pets, weights="random", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 100 images, half of them named after dogs, without labels."""
    names = [f"{i:03}-{'dog' if i % 2 else 'cat'}.png" for i in range(100)]
    return write_photos(tmp_path_factory.mktemp("data") / "unlabelled", names)


@pytest.fixture(scope="session")
def unlabelled(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """The cache of `flat`, of a small network; never to be changed."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return extract_features(flat, backbone="mobilenet_v3_small", weights="random", cache_dir=cache_dir)


@pytest.fixture(autouse=True)
def _in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models land in ./models where no --out is given."""
    monkeypatch.chdir(tmp_path)
