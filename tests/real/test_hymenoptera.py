"""The whole way on the tutorial's ants and bees, with ImageNet weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.predict import predict
from transfercache.commands.train import train_head

pytestmark = pytest.mark.real

EVERY = 7  # of the 397 photographs: 57 of both splits and classes


def test_extraction__has_every_photograph(extraction: Extraction) -> None:
    assert (extraction.rows, extraction.computed, extraction.bad, extraction.dim) == (397, 397, (), 512)
    table = extraction.table()
    assert np.bincount(table.split).tolist() == [0, 244, 153]
    assert np.bincount(table.labels).tolist() == [193, 204]
    assert table.class_names == ("ants", "bees")


def test_features__equal_plain_torchvision_row_by_row(
    extraction: Extraction, real_photos: Path, real_weights: Path
) -> None:
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(real_weights, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval()
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    table = extraction.table()
    rows = np.arange(0, len(table), EVERY)
    images = torch.stack([transform(Image.open(real_photos / table.paths[row]).convert("RGB")) for row in rows])
    with torch.inference_mode():
        expected = torch.cat([network(batch) for batch in images.split(19)]).numpy()
    assert len(rows) == 57
    np.testing.assert_allclose(table.features[rows], expected, rtol=1e-4, atol=1e-5)


def test_second_extraction__computes_nothing(extraction: Extraction, real_photos: Path, real_weights: Path) -> None:
    again = extract_features(real_photos, weights=str(real_weights), cache_dir=extraction.cache.parent)
    assert (again.computed, again.reused) == (0, 397)


def test_logistic_head__is_as_good_as_it_should_be(extraction: Extraction, tmp_path: Path) -> None:
    accuracies = []
    for seed in range(3):
        result = train_head(extraction, seed=seed, out=tmp_path / "head")
        assert result.reported is not None
        assert (result.reported.split, result.reported.n, result.n_train) == ("val", 153, 244)
        accuracies.append(result.reported.accuracy)
    assert np.mean(accuracies) >= 0.93


def test_unlabelled_photographs__are_scored_from_their_cache(
    extraction: Extraction, real_photos: Path, real_weights: Path, tmp_path: Path
) -> None:
    head = tmp_path / "head"
    train_head(extraction, C=0.1, out=head)
    flat = tmp_path / "flat"
    flat.mkdir()
    truth = {}
    for path in sorted(real_photos.glob("val/*/*.jpg"))[:: 153 // 50][:50]:
        name = f"{len(truth):03}.jpg"
        truth[name] = path.parent.name
        shutil.copy(path, flat / name)
    unlabelled = extract_features(flat, weights=str(real_weights), cache_dir=tmp_path / "cache")
    cached = predict(head, unlabelled.cache).images
    files = predict(head, [flat], cache_dir=tmp_path / "none").images
    assert [image.path for image in cached] == list(truth)
    assert [(image.path, image.label) for image in cached] == [(image.path, image.label) for image in files]
    np.testing.assert_allclose([i.probability for i in cached], [i.probability for i in files], atol=1e-5)
    assert np.mean([image.label == truth[image.path] for image in cached]) >= 0.88
