"""Decode -> forward -> write: threads decode ahead within a bound, one thread runs the network and writes."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfercache.cache.shard import ShardWriter
from transfercache.errors import DecodeError
from transfercache.images.decode import decode_image, read_image_bytes
from transfercache.images.manifest import Manifest
from transfercache.images.transforms import eval_pixels
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:  # the loop itself is torch-free: predicting from a cache imports this file
    from transfercache.backbones.engines import Engine

# Batches decoded ahead of the network: enough to bridge one slow image, few enough to bound memory
# (64 images of 224 px are 10 MB a batch).
_BATCHES_AHEAD = 3
# A commit syncs the disk; at most this many rows are computed again after a kill.
_ROWS_PER_COMMIT = 1024

_NOT_FINITE = "its embedding is not finite (NaN or infinity); are the weights damaged?"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PendingImage:
    """One slot of a shard and the manifest row that fills it."""

    slot: int
    row: int


@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """Embeddings of some images, and why others have none."""

    images: list[PendingImage]
    features: npt.NDArray[np.float32]  # float32 [len(images), D], finite
    bad: dict[int, str]  # manifest row -> reason


def fill_shard(
    writer: ShardWriter,
    pending: Sequence[PendingImage],
    manifest: Manifest,
    engine: Engine,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    watch: Stopwatch,
) -> dict[int, str]:
    """Compute and write the embeddings of `pending`; returns {manifest row: reason} for the images that are bad.

    What is written is committed every thousand rows and, whatever happens, at the end.
    """
    bad: dict[int, str] = {}
    uncommitted = 0
    batches = embed_images(
        pending, manifest, engine, preprocessing, batch_size=batch_size, workers=workers, watch=watch
    )
    try:
        # closing: on Ctrl-C the decoding threads end at once, not when the generator is collected.
        with closing(batches):
            for batch in batches:
                bad.update(batch.bad)
                uncommitted += len(batch.images)
                with watch.stage("write"):
                    if batch.images:
                        writer.write(np.array([image.slot for image in batch.images], dtype=np.int64), batch.features)
                    if uncommitted >= _ROWS_PER_COMMIT:
                        writer.commit()
                        uncommitted = 0
    finally:
        with watch.stage("write"):
            writer.commit()
    return bad


def embed_images(
    pending: Sequence[PendingImage],
    manifest: Manifest,
    engine: Engine,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    watch: Stopwatch,
) -> Generator[EmbeddedBatch, None, None]:
    """Yield the embeddings of `pending` batch by batch, in slot order.

    Slot s is computed in batch s // batch_size at position s % batch_size, other positions being zero, so that a
    row's bits do not depend on which rows an interrupted run had already written.
    """
    batches = _decoded_batches(pending, manifest, preprocessing, batch_size=batch_size, workers=workers, watch=watch)
    progress = tqdm(total=len(pending), unit="img", desc="extract", file=sys.stderr, disable=None)
    with closing(batches), progress as bar:
        for batch in batches:
            yield _embed(batch, engine, watch)
            bar.update(len(batch.images) + len(batch.bad))


@dataclass(frozen=True, eq=False)
class _DecodedBatch:
    images: list[PendingImage]
    positions: list[int]
    pixels: Pixels  # uint8 [batch_size, crop, crop, 3], zero where no image is pending
    bad: dict[int, str]


def _embed(batch: _DecodedBatch, engine: Engine, watch: Stopwatch) -> EmbeddedBatch:
    if not batch.images:
        return EmbeddedBatch([], np.zeros((0, 0), dtype=np.float32), batch.bad)
    with watch.stage("forward"):
        features = engine.embed(batch.pixels)[batch.positions]  # float32 [B, D]
    finite = np.asarray(np.isfinite(features).all(axis=1))  # bool [B]
    bad = {batch.images[i].row: _NOT_FINITE for i in np.flatnonzero(~finite)}
    images = [image for image, is_finite in zip(batch.images, finite, strict=True) if is_finite]
    return EmbeddedBatch(images, features[finite], {**batch.bad, **bad})


def _decoded_batches(
    pending: Sequence[PendingImage],
    manifest: Manifest,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    watch: Stopwatch,
) -> Generator[_DecodedBatch, None, None]:
    """Yield the batches of the grid in order, decoded in threads (Pillow releases the interpreter lock)."""

    def decode(row: int) -> Pixels:
        with watch.stage("decode"):
            return _decode_row(manifest, row, preprocessing)

    ahead: deque[tuple[list[PendingImage], list[Future[Pixels]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=workers or os.cpu_count(), thread_name_prefix="decode")
    try:
        for images in _grid(pending, batch_size):
            ahead.append((images, [pool.submit(decode, image.row) for image in images]))
            if len(ahead) > _BATCHES_AHEAD:
                yield _collect(*ahead.popleft(), batch_size=batch_size, crop=preprocessing.crop)
        while ahead:
            yield _collect(*ahead.popleft(), batch_size=batch_size, crop=preprocessing.crop)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _grid(pending: Sequence[PendingImage], batch_size: int) -> Iterator[list[PendingImage]]:
    images: list[PendingImage] = []
    for image in sorted(pending, key=lambda item: item.slot):
        if images and image.slot // batch_size != images[0].slot // batch_size:
            yield images
            images = []
        images.append(image)
    if images:
        yield images


def _collect(images: list[PendingImage], futures: list[Future[Pixels]], *, batch_size: int, crop: int) -> _DecodedBatch:
    pixels = np.zeros((batch_size, crop, crop, 3), dtype=np.uint8)
    kept: list[PendingImage] = []
    bad: dict[int, str] = {}
    for image, future in zip(images, futures, strict=True):
        try:
            decoded = future.result()
        except DecodeError as error:
            bad[image.row] = error.reason
            continue
        pixels[image.slot % batch_size] = decoded
        kept.append(image)
    return _DecodedBatch(kept, [image.slot % batch_size for image in kept], pixels, bad)


def _decode_row(manifest: Manifest, row: int, preprocessing: Preprocessing) -> Pixels:
    path = manifest.paths[row]
    data = read_image_bytes(manifest.path_of(row), path)
    if not manifest.has_content(row, data):
        raise DecodeError(path, "it changed while it was being read; run the same command again")
    return eval_pixels(decode_image(data, path), preprocessing)
