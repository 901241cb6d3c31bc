"""JPEG files decoded by TorchCodec and resized by torch: the policy `fast`, which loads torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.ExifTags import Base
from torchcodec.decoders import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from transfercache.images.decode import JPEG_FORMATS, PILLOW_ERRORS, decode_image, opened_image
from transfercache.images.transforms import Picture

_INTERPOLATION = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
}

# The marker of a segment, its length, a name of six bytes (TorchCodec does not look at it), and the byte order of EXIF.
_EXIF = re.compile(rb"\xff\xe1.{8}(?:II|MM)", re.DOTALL)
_APP15 = 0xEF  # the marker of a segment that nothing reads

# From how a picture is stored to how it is seen (EXIF 2.3, tag 274): from 5 on it is transposed; then it is mirrored
# along these of its axes [3, H, W].
_MIRRORED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}


@dataclass(frozen=True, eq=False)
class TensorPicture:
    """A `Picture` whose pixels are a uint8 tensor [3, H, W]."""

    pixels: torch.Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def crop(self, box: tuple[int, int, int, int], /) -> TensorPicture:
        """Return the part from (left, top) up to (right, bottom); what lies outside is black."""
        left, top, right, bottom = box
        return TensorPicture(functional.crop(self.pixels, top, left, bottom - top, right - left))

    def resize(self, size: tuple[int, int], resample: int, /) -> TensorPicture:
        """Return the picture at (width, height), within two grey levels of Pillow's."""
        method = _INTERPOLATION[Image.Resampling(resample)]
        return TensorPicture(functional.resize(self.pixels, [size[1], size[0]], method, antialias=True))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.pixels.permute(1, 2, 0).numpy(), dtype, order="C")


def decode_fast(data: bytes, path: str) -> Picture:
    """Return what `decode_image` returns, a JPEG decoded by TorchCodec, pixel for pixel the same.

    Pillow decodes all other files, and those that TorchCodec refuses, and says what is wrong with them: DecodeError.
    """
    with opened_image(data, path) as opened:
        orientation = 1
        with suppress(*PILLOW_ERRORS):  # damaged metadata is no reason to lose the pixels
            orientation = opened.getexif().get(Base.Orientation, 1)
        pixels = _decode_jpeg(data, opened.size) if opened.format in JPEG_FORMATS else None
    if pixels is None:
        return decode_image(data, path)
    return TensorPicture(_upright(pixels, orientation))


def _decode_jpeg(data: bytes, size: Sequence[int]) -> torch.Tensor | None:
    """Return the pixels as they are stored, uint8 [3, H, W], or None where TorchCodec refuses the file."""
    coded = bytearray(data)
    # TorchCodec turns a picture by its EXIF with no way to keep it from that, and sees no orientation in XMP.
    for segment in _EXIF.finditer(data):
        coded[segment.start() + 1] = _APP15
    try:
        pixels: torch.Tensor = decode_jpeg(torch.frombuffer(coded, dtype=torch.uint8), mode="RGB")
    except RuntimeError:
        return None
    return pixels if pixels.shape == (3, size[1], size[0]) else None


def _upright(pixels: torch.Tensor, orientation: object) -> torch.Tensor:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    return pixels.flip(_MIRRORED[orientation]) if orientation in _MIRRORED else pixels
