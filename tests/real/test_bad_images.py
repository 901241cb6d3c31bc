"""Holes torn into the tutorial's ants and bees, as docs/images.md reports them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from transfercache.images.jpeg import hole_bytes

pytestmark = pytest.mark.real

HOLE_BYTES = 4096


def with_a_hole(data: bytes) -> bytes:
    start = (len(data) - HOLE_BYTES) // 2
    return data[:start] + bytes(HOLE_BYTES) + data[start + HOLE_BYTES :]


def test_hole__in_each_photograph_is_found_and_in_none_that_is_whole(real_photos: Path) -> None:
    photos = [path.read_bytes() for path in sorted(real_photos.glob("*/*/*.jp*g"))]
    assert len(photos) == 397
    assert [hole_bytes(data) for data in photos] == [0] * 397
    assert sum(hole_bytes(with_a_hole(data)) >= HOLE_BYTES for data in photos) == 397


def test_hole__in_progressive_photographs_is_found_in_most(real_photos: Path) -> None:
    found = n_photos = 0
    for path in sorted(real_photos.glob("val/*/*.jpg")):
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "JPEG", quality=75, progressive=True)
        assert hole_bytes(buffer.getvalue()) == 0
        found += hole_bytes(with_a_hole(buffer.getvalue())) > 0
        n_photos += 1
    assert found / n_photos > 0.5  # 0.67 of all 397: see docs/images.md
