from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

from transfercache.finetuning.trivial import OPERATIONS, apply, trivial_augment

THEIRS = TrivialAugmentWide()


def _photo() -> Image.Image:
    """Smooth colours with grain, of another height than width."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(blobs) + rng.normal(0, 4, (48, 60, 1)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", OPERATIONS)
def test_apply__each_operation_is_torchvisions_at_every_strength(name: str) -> None:
    image = _photo()
    strengths, is_signed = THEIRS._AUGMENTATION_SPACE[name]
    theirs = strengths(THEIRS.num_magnitude_bins, *image.size[::-1])
    for strength in range(31):
        magnitude = 0.0 if theirs is None else float(theirs[strength])
        for sign in (1, -1) if is_signed else (1,):
            expected = THEIRS._apply_image_or_video_transform(
                image, name, sign * magnitude, InterpolationMode.NEAREST, fill={Image.Image: None}
            )
            assert apply(image, name, sign * strength).tobytes() == expected.tobytes(), (strength, sign)


def test_space__is_torchvisions() -> None:
    assert list(OPERATIONS) == list(THEIRS._AUGMENTATION_SPACE)


def test_trivial_augment__draws_from_the_given_generator_alone_and_leaves_the_image() -> None:
    image = _photo()
    before = image.tobytes()
    first, again = ([trivial_augment(image, np.random.default_rng(i)).tobytes() for i in range(60)] for _ in range(2))
    assert first == again
    assert image.tobytes() == before
    # One in fourteen is the identity, and some of the others have no strength.
    assert 2 < Counter(first)[before] < 20
    assert len(set(first)) > 30
