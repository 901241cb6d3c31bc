"""From a decoded image to the square of pixels that a network sees; normalisation is the engine's."""

from __future__ import annotations

import math
from typing import Protocol, Self

import numpy as np
from PIL import Image

from transfercache.arrays import UInt8Array
from transfercache.randomness import derive_rng
from transfercache.spec import Preprocessing

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# A strip of 1 x 5000 pixels would be enlarged to a gigabyte; its middle is all that the crop can see.
_MAX_ASPECT = 200

# RandomResizedCrop as in the tutorial: torchvision's defaults, after Szegedy et al. 2015.
_LEAST_AREA = 0.08
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_FLIP_PROBABILITY = 0.5


class Picture(Protocol):
    """A decoded RGB image, `numpy.array` of which is uint8 [H, W, 3]: Pillow's, or one that is used like it."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        ...

    def crop(self, box: tuple[int, int, int, int], /) -> Self:
        """Return the part from (left, top) up to (right, bottom); what lies outside is black."""
        ...

    def resize(self, size: tuple[int, int], resample: int, /) -> Self:
        """Return the picture at (width, height), antialiased; `resample` is one of `Image.Resampling`."""
        ...


def view_pixels(image: Picture, preprocessing: Preprocessing, *, digest: bytes, view: int) -> UInt8Array:
    """Return uint8 [crop, crop, 3], one view of an image whose file has the SHA-256 `digest` (32 bytes).

    View 0 is the eval transform and view 1 its mirror image; each further one is drawn from the training augmentation
    by a generator of its own, so that it depends on the image's bytes and its number alone.
    """
    if view == 0:
        return eval_pixels(image, preprocessing)
    if view == 1:
        return np.ascontiguousarray(eval_pixels(image, preprocessing)[:, ::-1])
    return train_pixels(image, preprocessing, derive_rng(0, "view", digest.hex(), view))


def eval_pixels(image: Picture, preprocessing: Preprocessing) -> UInt8Array:
    """Return uint8 [crop, crop, 3]: shorter side to `resize`, then the centred square.

    Bit for bit torchvision's Resize and CenterCrop on the same Pillow image, up to an aspect of 200.
    """
    image = _middle(image)
    width, height = image.size
    shorter, longer = sorted((width, height))
    # torchvision cuts the longer side off rather than rounding it.
    long_side = int(preprocessing.resize * longer / shorter)
    size = (preprocessing.resize, long_side) if width <= height else (long_side, preprocessing.resize)
    resized = image.resize(size, _RESAMPLING[preprocessing.interpolation])
    left, top = (_centre(length, preprocessing.crop) for length in size)
    # Where the crop is larger than the image, Pillow fills with black, as torchvision does.
    return np.array(resized.crop((left, top, left + preprocessing.crop, top + preprocessing.crop)))


def _middle(image: Picture) -> Picture:
    longest = min(image.size) * _MAX_ASPECT
    if max(image.size) <= longest:
        return image
    width, height = (min(length, longest) for length in image.size)
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _centre(length: int, crop: int) -> int:
    return -((crop - length) // 2) if crop > length else round((length - crop) / 2)


def train_pixels(
    image: Picture, preprocessing: Preprocessing, rng: np.random.Generator, *, least_area: float = _LEAST_AREA
) -> UInt8Array:
    """Return uint8 [crop, crop, 3]: a random part of the image brought to size, and mirrored half of the time.

    The part has at least the share `least_area` of the image. Draws from `rng` alone, so that the same generator gives
    the same view in any thread. Given the box, bit for bit torchvision's resized_crop on the same Pillow image.
    """
    top, left, height, width = draw_crop(*image.size, rng, least_area=least_area)
    part = image.crop((left, top, left + width, top + height))
    side = preprocessing.crop
    pixels = np.array(part.resize((side, side), _RESAMPLING[preprocessing.interpolation]))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < _FLIP_PROBABILITY else pixels


def draw_crop(
    width: int, height: int, rng: np.random.Generator, *, least_area: float = _LEAST_AREA
) -> tuple[int, int, int, int]:
    """Return top, left, height and width in pixels of a box of random area and aspect within the image.

    As torchvision's RandomResizedCrop: ten tries, then the largest centred box of an allowed aspect.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(least_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = width, height
    if width / height < aspect:
        h = round(width / aspect)
    elif width / height > aspect:
        w = round(height * aspect)
    return (height - h) // 2, (width - w) // 2, h, w


def grey_pixels(image: Image.Image, side: int) -> UInt8Array:
    """Return uint8 [side, side]: the whole image as grey values, its aspect given up."""
    return np.array(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))
