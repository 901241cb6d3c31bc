"""`--decode` from the command to the cache, the head and its predictions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfercache.backbones.registry import load_backbone
from transfercache.cache.reader import open_cache
from transfercache.commands.compare import compare
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.predict import load, predict
from transfercache.commands.train import train_head
from transfercache.errors import DataError, ModelError, ResourceError, UsageError
from transfercache.images.decode import decode_image
from transfercache.images.transforms import eval_pixels

BACKBONE = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of JPEG files of 1200 x 1100 pixels with grain, which `draft` decodes at a quarter."""
    folder = tmp_path_factory.mktemp("data") / "large"
    for seed in range(12):
        path = folder / ("cat" if seed % 2 else "dog") / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grain = np.random.default_rng(seed).integers(0, 100 + 100 * (seed % 2), (1100, 1200, 3), dtype=np.uint8)
        Image.fromarray(grain).save(path)
    return folder


@pytest.fixture(scope="module")
def shrunk(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    cache_dir = tmp_path_factory.mktemp("cache")
    return extract_features(large, backbone=BACKBONE, weights="random", decode="draft", cache_dir=cache_dir)


def test_extract__decodes_by_the_policy_into_a_cache_of_its_own(
    large: Path, shrunk: Extraction, tmp_path: Path
) -> None:
    plain = extract_features(large, backbone=BACKBONE, weights="random", cache_dir=tmp_path)
    assert plain.computed == 12
    assert plain.cache != shrunk.cache
    assert [open_cache(item.cache).spec.preprocessing.decoder for item in (plain, shrunk)] == ["pillow", "draft"]
    features, reference = shrunk.arrays()[0], plain.arrays()[0]
    assert np.abs(features - reference).max() > 1e-3 * np.abs(reference).max()
    again = extract_features(large, backbone=BACKBONE, weights="random", decode="draft", cache_dir=shrunk.cache.parent)
    assert (again.cache, again.computed, again.reused) == (shrunk.cache, 0, 12)


def test_extract__part__names_the_policy_in_the_command_that_gathers(large: Path, tmp_path: Path) -> None:
    result = extract_features(
        large, backbone=BACKBONE, weights="random", decode="draft", cache_dir=tmp_path, part="1/2", batch_size=4
    )
    assert "--decode draft" in " ".join(result.next_command)


def test_head__of_draft__predicts_from_shrunk_images(large: Path, shrunk: Extraction, tmp_path: Path) -> None:
    # DATA finds the cache although it is not of the default policy.
    head = train_head(large, backbone=BACKBONE, weights="random", C=1.0, cache_dir=shrunk.cache.parent)
    cached = predict(head.head, shrunk.cache).images
    fresh = predict(head.head, [large], cache_dir=tmp_path / "none").images
    assert [image.path for image in cached] == [image.path for image in fresh]
    np.testing.assert_allclose(
        [image.probability for image in cached], [image.probability for image in fresh], rtol=1e-4
    )


def test_fast__what_is_computed_is_near_pillows(large: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec")
    fast = extract_features(large, backbone=BACKBONE, weights="random", decode="fast", cache_dir=tmp_path)
    plain = extract_features(large, backbone=BACKBONE, weights="random", cache_dir=tmp_path)
    assert (fast.computed, plain.computed) == (12, 12)
    a, b = fast.arrays()[0], plain.arrays()[0]
    np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())
    assert not np.array_equal(a, b)  # a grey level here and there: else it was Pillow that resized


def test_train_head__of_data_that_has_changed__names_the_policy_of_its_cache(large: Path, tmp_path: Path) -> None:
    photos, cache_dir = tmp_path / "photos", tmp_path / "cache"
    shutil.copytree(large, photos)
    extract_features(photos, backbone=BACKBONE, weights="random", decode="draft", cache_dir=cache_dir)
    (photos / "cat" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"bring that up to date: tlc extract-features .* --decode draft$"):
        train_head(photos, backbone=BACKBONE, weights="random", cache_dir=cache_dir)


def test_compare__extracts_by_the_policy(large: Path, shrunk: Extraction) -> None:
    result = compare(
        large, strategies="knn", backbone=BACKBONE, weights="random", decode="draft", cache_dir=shrunk.cache.parent
    )
    assert result.caches == {BACKBONE: shrunk.cache}


def test_fast__that_is_not_installed__fails_before_anything_is_read(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.delitem(sys.modules, "transfercache.images.fast", raising=False)
    monkeypatch.setattr("transfercache.commands.inputs.hash_files", None)
    for command in (extract_features, compare):
        with pytest.raises(ResourceError, match=r"pip install 'transfercache\[fast\]'"):
            command(large, backbone=BACKBONE, weights="random", decode="fast", cache_dir=tmp_path)


def test_fast__of_a_model__that_is_not_installed__is_named(
    large: Path, shrunk: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchcodec")
    cache = extract_features(large, backbone=BACKBONE, weights="random", decode="fast", cache_dir=tmp_path).cache
    head = train_head(cache, C=1.0).head
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.delitem(sys.modules, "transfercache.images.fast", raising=False)
    with pytest.raises(ResourceError, match=r"pip install 'transfercache\[fast\]'"):
        predict(head, [large], cache_dir=tmp_path / "none")
    assert len(predict(head, cache).images) == 12  # its rows need no decoder


def test_unknown_decoder__is_refused_in_one_line(large: Path, shrunk: Extraction, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--decode 'jpeg' is none of pillow, fast, draft"):
        extract_features(large, decode="jpeg", cache_dir=tmp_path)
    head = Path(train_head(shrunk.cache, C=1.0).head)
    assert head.read_bytes().count(b"draft") == 1
    changed = tmp_path / "stranger.safetensors"
    changed.write_bytes(head.read_bytes().replace(b"draft", b"jpeg9"))
    with pytest.raises(ModelError, match=r"^[^\n]*'jpeg9' is none of pillow, fast, draft[^\n]*$"):
        load(changed)


def test_draft__pixels_are_those_of_the_shrunk_image(large: Path, shrunk: Extraction) -> None:
    backbone = load_backbone(BACKBONE, weights="random")
    data = (large / "cat/1.jpg").read_bytes()
    image = decode_image(data, "", least_side=backbone.preprocessing.resize)
    assert image.size == (300, 275)
    assert eval_pixels(image, backbone.preprocessing).shape == (224, 224, 3)
