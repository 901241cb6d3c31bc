"""TrivialAugment over torchvision's operations, drawn from a generator that is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL.Image import Image
from torchvision.transforms.v2 import functional as F  # noqa: N812 - as torchvision does

#: The paper's "wide" space: strengths from nothing to the most that an operation does.
_STRONGEST = 30


def trivial_augment(image: Image, rng: np.random.Generator) -> Image:
    """Return the image after one operation of a drawn strength (Müller and Hutter 2021, algorithm 1, wide space).

    torchvision's own transform draws from torch's global generator, so that threads that decode would race for it.
    """
    name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
    strength = int(rng.integers(_STRONGEST + 1))
    return apply(image, name, strength if rng.random() < 0.5 else -strength)


def apply(image: Image, name: str, strength: int) -> Image:
    """Return the image after one operation; `strength` is -30 to 30, and its sign counts where there are two ways."""
    levels, operation = OPERATIONS[name]
    level = levels[abs(strength)]
    return operation(image, level if strength >= 0 else -level)


def _up_to(most: float) -> list[float]:
    # In torch's float32, so that every strength is torchvision's to the bit.
    levels: list[float] = torch.linspace(0.0, most, _STRONGEST + 1).tolist()
    return levels


def _affine(image: Image, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Image:
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    # A shear keeps the top left corner where it is.
    centre = [0, 0] if any(shear) else None
    return cast(Image, F.affine(image, angle=0.0, translate=list(shift), scale=1.0, shear=degrees, center=centre))


_WITHOUT = [0.0] * (_STRONGEST + 1)
_BITS = [float(round(8 - 6 * strength / _STRONGEST)) for strength in range(_STRONGEST + 1)]
_THRESHOLDS: list[float] = torch.linspace(1.0, 0.0, _STRONGEST + 1).tolist()

#: Name -> levels by strength, and the operation of an image and a level, which is negative half of the time.
OPERATIONS: dict[str, tuple[list[float], Callable[[Image, float], Image]]] = {
    "Identity": (_WITHOUT, lambda image, level: image),
    "ShearX": (_up_to(0.99), lambda image, level: _affine(image, shear=(level, 0.0))),
    "ShearY": (_up_to(0.99), lambda image, level: _affine(image, shear=(0.0, level))),
    "TranslateX": (_up_to(32.0), lambda image, level: _affine(image, shift=(int(level), 0))),
    "TranslateY": (_up_to(32.0), lambda image, level: _affine(image, shift=(0, int(level)))),
    "Rotate": (_up_to(135.0), lambda image, level: F.rotate(image, angle=level)),
    "Brightness": (_up_to(0.99), lambda image, level: F.adjust_brightness(image, 1.0 + level)),
    "Color": (_up_to(0.99), lambda image, level: F.adjust_saturation(image, 1.0 + level)),
    "Contrast": (_up_to(0.99), lambda image, level: F.adjust_contrast(image, 1.0 + level)),
    "Sharpness": (_up_to(0.99), lambda image, level: F.adjust_sharpness(image, 1.0 + level)),
    "Posterize": (_BITS, lambda image, level: F.posterize(image, bits=int(abs(level)))),
    "Solarize": (_THRESHOLDS, lambda image, level: F.solarize(image, threshold=255.0 * abs(level))),
    "AutoContrast": (_WITHOUT, lambda image, level: F.autocontrast(image)),
    "Equalize": (_WITHOUT, lambda image, level: F.equalize(image)),
}
