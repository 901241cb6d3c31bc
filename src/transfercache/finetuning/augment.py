"""A row's pixels as an epoch shows them. Torch is loaded for TrivialAugment alone: processes that decode load this."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL.Image import fromarray

from transfercache.arrays import UInt8Array
from transfercache.images.decode import decode_image
from transfercache.images.files import HashedFile
from transfercache.images.transforms import eval_pixels, train_pixels
from transfercache.randomness import derive_rng
from transfercache.spec import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """Loads a row of an epoch: as its seed, epoch and row say, whatever loads it and in which order."""

    preprocessing: Preprocessing
    epoch: int | None  # None: as the eval transform shows it
    augment: str  # one of config.Augment
    crop_area: float
    seed: int

    def __call__(self, item: tuple[int, HashedFile]) -> UInt8Array:
        """Return uint8 [crop, crop, 3] of a row and its file; raises DecodeError."""
        row, file = item
        image = decode_image(file.read(), file.shown)
        if self.epoch is None or self.augment == "none":
            return eval_pixels(image, self.preprocessing)
        rng = derive_rng(self.seed, "augment", self.epoch, row)
        pixels = train_pixels(image, self.preprocessing, rng, least_area=self.crop_area)
        if self.augment == "crop":
            return pixels
        from transfercache.finetuning.trivial import trivial_augment

        return np.array(trivial_augment(fromarray(pixels), rng))
