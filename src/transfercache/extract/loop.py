"""Decode -> forward -> write, each beside the others: decoding runs ahead and writing behind, within bounds."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfercache.cache.shard import ShardWriter, as_stored
from transfercache.errors import DecodeError
from transfercache.images.decode import pick_decoder
from transfercache.images.files import HashedFile
from transfercache.images.manifest import Manifest
from transfercache.images.processes import decode_ahead, decoding_workers
from transfercache.images.transforms import view_pixels
from transfercache.spec import ExtractSpec, Preprocessing
from transfercache.stopwatch import Stopwatch, busiest

if TYPE_CHECKING:  # the loop itself is torch-free: predicting from a cache imports this file
    from transfercache.backbones.choice import Engine

# Batches decoded ahead of the network: enough to bridge one slow image, few enough to bound memory
# (64 images of 224 px are 10 MB a batch).
_BATCHES_AHEAD = 3
# Batches computed and not yet written: what a commit's wait for the disk can hide behind.
_BATCHES_BEHIND = 2
# A commit syncs the disk; at most this many rows are computed again after a kill, or fewer of wide ones, so that the
# sync is no long wait.
_ROWS_PER_COMMIT = 1024
_BYTES_PER_COMMIT = 64 << 20

_NOT_FINITE = "its embedding is not finite (NaN or infinity); are the weights damaged?"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PendingView:
    """One slot of a shard, and the view of a manifest row that fills it."""

    slot: int
    row: int
    view: int = 0


@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """Embeddings of some views, and why other rows have none."""

    views: list[PendingView]
    features: npt.NDArray[np.float32]  # float32 [len(views), D], finite in the spec's storage dtype
    bad: dict[int, str]  # manifest row -> reason


@dataclass(frozen=True, eq=False)
class Embedder:
    """Turns views of a manifest's images into embeddings under a spec; what it took is charged to `watch`."""

    manifest: Manifest
    spec: ExtractSpec
    engine: Callable[[], Engine]  # asked for when a first image is to be embedded
    workers: int | None  # that decode; None: see `decoding_workers`
    watch: Stopwatch
    #: The engine and the versions of now (cache/provenance.py), where its rows are compared with a cache's.
    makers: Mapping[str, str] = field(default_factory=dict)

    def embed(self, pending: Sequence[PendingView], *, batch_size: int) -> Generator[EmbeddedBatch, None, None]:
        """Yield the embeddings of `pending` batch by batch, in slot order.

        Slot s is computed in batch s // batch_size at position s % batch_size, other positions being zero, so that a
        row's bits do not depend on which rows an interrupted run had already written. Raises ResourceError where what
        the spec names for decoding is not installed.
        """
        n_images = len({item.row for item in pending})
        n_decoding = decoding_workers(self.workers, n_images, is_light=self._decodes_without_torch)
        threads = {"decode": n_decoding, "forward": 1, "write": 1}
        batches = self._decoded_batches(pending, batch_size, n_images)
        progress = tqdm(total=len(pending), unit="img", desc="extract", file=sys.stderr, disable=None)
        with closing(batches), progress as bar:
            for batch in batches:
                yield self._embed(batch)
                bar.set_postfix_str(f"limited by {busiest(self.watch.seconds(), threads=threads)}", refresh=False)
                bar.update(batch.n_views)

    def _embed(self, batch: _DecodedBatch) -> EmbeddedBatch:
        if not batch.views:
            return EmbeddedBatch([], np.zeros((0, 0), dtype=np.float32), batch.bad)
        engine = self.engine()
        with self.watch.stage("forward"):
            features = engine.embed(batch.pixels)[batch.positions]  # float32 [B, D]
        dtype = self.spec.storage_dtype
        stored = as_stored(features, dtype)
        # float16 also loses a row whose every value is too small for it.
        fits = np.isfinite(stored).all(axis=1) & (stored.any(axis=1) | ~features.any(axis=1))  # bool [B]
        bad = {batch.views[i].row: _why_it_does_not_fit(features[i], dtype) for i in np.flatnonzero(~fits)}
        views = [view for view, is_finite in zip(batch.views, fits, strict=True) if is_finite]
        return EmbeddedBatch(views, features[fits], {**batch.bad, **bad})

    @property
    def _decodes_without_torch(self) -> bool:
        return self.spec.preprocessing.decoder != "fast"

    def _decoded_batches(
        self, pending: Sequence[PendingView], batch_size: int, n_images: int
    ) -> Generator[_DecodedBatch, None, None]:
        """Yield the batches of the grid in order, decoded ahead; an image is decoded once for its views."""
        n_views = len({item.view for item in pending}) or 1
        window = max(_BATCHES_AHEAD * batch_size // n_views, 1)
        pick_decoder(self.spec.preprocessing)  # raises before anything is started for it
        images = decode_ahead(
            self._by_image(pending, batch_size),
            functools.partial(_load, self.spec.preprocessing),
            n_images=n_images,
            is_light=self._decodes_without_torch,
            workers=self.workers,
            window=window,
            watch=self.watch,
        )
        with closing(images):
            for _, members in itertools.groupby(images, key=lambda image: image[0].views[0].slot // batch_size):
                yield _collect(list(members), batch_size=batch_size, crop=self.spec.preprocessing.crop)

    def _by_image(self, pending: Sequence[PendingView], batch_size: int) -> Iterator[_Image]:
        """Yield, in slot order, the views of one image within one batch of the grid."""
        in_order = sorted(pending, key=lambda item: item.slot)
        for (_, row), views in itertools.groupby(in_order, key=lambda item: (item.slot // batch_size, item.row)):
            yield _Image(self.manifest.file(row), list(views))


def fill_shard(
    writer: ShardWriter, pending: Sequence[PendingView], embedder: Embedder, *, batch_size: int
) -> dict[int, str]:
    """Compute and write the embeddings of `pending`; returns {manifest row: reason} for the images that are bad.

    What is written is committed every thousand rows (of wide rows: every 64 MiB) and, whatever happens, at the end.
    """
    bad: dict[int, str] = {}
    rows = _RowWriter(writer, embedder.watch)
    behind: deque[Future[None]] = deque()
    try:
        # closing: on Ctrl-C what decodes ends at once, not when the generator is collected. What is computed by
        # then is still written: leaving the pool waits for it.
        with ThreadPoolExecutor(1, "write") as disk, closing(embedder.embed(pending, batch_size=batch_size)) as batches:
            for batch in batches:
                bad.update(batch.bad)
                behind.append(disk.submit(rows.write, batch))
                if len(behind) > _BATCHES_BEHIND:
                    behind.popleft().result()
            for written in behind:
                written.result()
    finally:
        rows.commit()
    return bad


@dataclass(eq=False)
class _RowWriter:
    """Writes batches into a shard, and commits them now and then."""

    shard: ShardWriter
    watch: Stopwatch
    n_uncommitted: int = 0
    n_bytes: int = 0  # of these, as they were computed

    def write(self, batch: EmbeddedBatch) -> None:
        with self.watch.stage("write"):
            if batch.views:
                self.shard.write(np.array([view.slot for view in batch.views], dtype=np.int64), batch.features)
        self.n_uncommitted += len(batch.views)
        self.n_bytes += batch.features.nbytes
        if self.n_uncommitted >= _ROWS_PER_COMMIT or self.n_bytes >= _BYTES_PER_COMMIT:
            self.commit()

    def commit(self) -> None:
        with self.watch.stage("write"):
            self.shard.commit()
        self.n_uncommitted = self.n_bytes = 0


def _why_it_does_not_fit(features: npt.NDArray[np.float32], dtype: str) -> str:
    if not np.isfinite(features).all():
        return _NOT_FINITE
    return f"its embedding reaches {np.abs(features).max():.4g}, beyond what {dtype} holds; use --storage-dtype float32"


@dataclass(frozen=True, eq=False)
class _DecodedBatch:
    views: list[PendingView]
    positions: list[int]
    pixels: Pixels  # uint8 [batch_size, crop, crop, 3], zero where no view is pending
    bad: dict[int, str]
    n_views: int  # those of bad images included


@dataclass(frozen=True, slots=True)
class _Image:
    file: HashedFile
    views: list[PendingView]


def _load(preprocessing: Preprocessing, image: _Image) -> list[Pixels]:
    """Return the pixels of the views; a process may do it, so that it is given all that it needs."""
    file = image.file
    assert file.digest is not None
    picture = pick_decoder(preprocessing)(file.read(), file.shown)
    return [view_pixels(picture, preprocessing, digest=file.digest, view=item.view) for item in image.views]


def _collect(images: list[tuple[_Image, Future[list[Pixels]]]], *, batch_size: int, crop: int) -> _DecodedBatch:
    pixels = np.zeros((batch_size, crop, crop, 3), dtype=np.uint8)
    kept: list[PendingView] = []
    bad: dict[int, str] = {}
    for image, future in images:
        try:
            loaded = future.result()
        except DecodeError as error:
            bad[image.views[0].row] = error.reason
            continue
        for view, one in zip(image.views, loaded, strict=True):
            pixels[view.slot % batch_size] = one
        kept.extend(image.views)
    n_views = sum(len(image.views) for image, _ in images)
    return _DecodedBatch(kept, [view.slot % batch_size for view in kept], pixels, bad, n_views)
