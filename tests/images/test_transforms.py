from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from transfercache.images.transforms import draw_crop, eval_pixels, grey_pixels, train_pixels
from transfercache.spec import Preprocessing

SIZES = [(300, 200), (200, 300), (256, 256), (257, 333), (60, 41), (224, 1000), (1, 50), (500, 3)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(width * 7 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def preprocessing(resize: int = 256, crop: int = 224, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(resize=resize, crop=crop, interpolation=interpolation, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 224), (232, 223), (41, 64), (40, 63)])
@pytest.mark.parametrize("size", SIZES)
def test_eval_pixels__equals_torchvision(size: tuple[int, int], resize: int, crop: int, interpolation: str) -> None:
    image = noise(*size)
    reference = transforms.Compose(
        [transforms.Resize(resize, InterpolationMode(interpolation)), transforms.CenterCrop(crop)]
    )
    pixels = eval_pixels(image, preprocessing(resize, crop, interpolation))
    assert (pixels.dtype, pixels.shape, pixels.flags.writeable) == (np.uint8, (crop, crop, 3), True)
    np.testing.assert_array_equal(pixels, np.asarray(reference(image)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_train_pixels__given_the_box_equals_torchvision(size: tuple[int, int], interpolation: str) -> None:
    image = noise(*size)
    flips = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        top, left, height, width = draw_crop(*size, rng)
        flip = rng.random() < 0.5
        flips.add(flip)
        reference = v2.functional.resized_crop(
            image, top, left, height, width, [96, 96], InterpolationMode(interpolation)
        )
        reference = v2.functional.horizontal_flip(reference) if flip else reference
        pixels = train_pixels(image, preprocessing(crop=96, interpolation=interpolation), np.random.default_rng(seed))
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, np.asarray(reference))
    assert flips == {True, False}


def test_draw_crop__lies_within_and_has_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(300, 200, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 200
    assert (left + width).max() <= 300
    area = height * width / 60_000
    aspect = width / height
    assert 0.078 < area.min() < 0.09
    assert 0.85 < area.max() <= 0.89  # at an aspect of 4/3 a box covers 8/9 of a 3:2 image
    assert 0.72 < aspect.min() < 0.76
    assert 1.31 < aspect.max() < 1.36
    drawn = np.array(
        [transforms.RandomResizedCrop.get_params(noise(300, 200), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    )
    assert abs(area.mean() - (drawn[:, 2] * drawn[:, 3]).mean() / 60_000) < 0.02
    assert abs(aspect.mean() - (drawn[:, 3] / drawn[:, 2]).mean()) < 0.02


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)])
def test_draw_crop__falls_back_to_the_centre(size: tuple[int, int]) -> None:
    # No box of an allowed aspect holds 8 % of so long an image, so every draw is torchvision's fallback.
    expected = transforms.RandomResizedCrop.get_params(noise(*size), [0.08, 1.0], [3 / 4, 4 / 3])
    for seed in range(20):
        assert draw_crop(*size, np.random.default_rng(seed)) == tuple(expected)


def test_draw_crop__has_the_least_area_that_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(300, 300, rng, least_area=0.5) for _ in range(1000)])
    area = boxes[:, 2] * boxes[:, 3] / 90_000
    assert 0.49 < area.min() < 0.53  # sides are whole pixels
    assert 0.95 < area.max() <= 1.0


def test_grey_pixels__whole_image_as_grey() -> None:
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = (255, 255, 255)
    grey = grey_pixels(Image.fromarray(pixels), 32)
    assert (grey.dtype, grey.shape) == (np.uint8, (32, 32))
    np.testing.assert_array_equal(grey[:, [0, 14, 17, 31]], np.tile([0, 0, 255, 255], (32, 1)).astype(np.uint8))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_eval_pixels__a_strip_is_not_enlarged_to_gigabytes(size: tuple[int, int]) -> None:
    # Black but for the very middle: 30 million pixels would have to be made of it, of which the crop sees none.
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels.reshape(-1, 3)[29_995:30_005] = 200
    seen = eval_pixels(Image.fromarray(pixels), preprocessing())
    np.testing.assert_array_equal(seen, np.full((224, 224, 3), 200, dtype=np.uint8))
