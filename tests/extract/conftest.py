from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfercache.cache.provenance import Run
from transfercache.cache.reader import open_cache
from transfercache.cache.store import find_or_create
from transfercache.extract.loop import Embedder
from transfercache.extract.run import ExtractionRun, Outcome
from transfercache.images.manifest import hash_files, split_rows
from transfercache.images.sources import read_source
from transfercache.spec import ExtractSpec, Preprocessing
from transfercache.stopwatch import Stopwatch

DIM = 6
BATCH_SIZE = 4
PREPROCESSING = Preprocessing(resize=8, crop=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
SPEC = ExtractSpec(backbone="made", weights_digest="0" * 64, boundary="pooled", preprocessing=PREPROCESSING)


class PositionedEngine:
    """Embeds an image as its mean colour, its position in the batch, the batch's length, and a constant.

    A real network's last bits depend on the batch around a row; here that shows in whole numbers.
    """

    name = "positioned"

    def __init__(self, *, fails_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.batches: list[int] = []  # images that are not padding, batch by batch
        self._fails_at, self._error = fails_at, error

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        if len(self.batches) == self._fails_at:
            raise self._error
        self.batches.append(int(pixels.any(axis=(1, 2, 3)).sum()))
        n = len(pixels)
        means = pixels.mean(axis=(1, 2))  # [B, 3]
        columns = [means, np.arange(n)[:, None], np.full((n, 1), n), np.ones((n, 1))]
        return np.concatenate(columns, axis=1).astype(np.float32)


@dataclass
class Extractor:
    """Runs an extraction of `data` as the command does, with an engine of the test's own."""

    data: Path
    cache_dir: Path
    engine: PositionedEngine = field(default_factory=PositionedEngine)
    folder: Path | None = None
    before_decoding: Callable[[], None] = lambda: None
    n_views: int = 1
    prove: bool = False
    storage_dtype: str = "float32"
    preprocessing: Preprocessing = PREPROCESSING
    versions: dict[str, str] = field(default_factory=lambda: {"torch": "2.9", "pillow": "12.0"})

    def run(self, engine: PositionedEngine | None = None) -> Outcome:
        engine = engine or PositionedEngine()
        self.engine = engine
        manifest = read_source(self.data)
        store = find_or_create(
            self.cache_dir,
            data_name=manifest.name,
            data_root=manifest.root,
            spec=replace(SPEC, storage_dtype=self.storage_dtype, preprocessing=self.preprocessing),
            canaries=np.zeros((4, DIM), np.float32),
        )
        self.folder = store.folder
        rows = None if self.prove else store.rows()
        known = {} if rows is None else rows.known_files()
        manifest = hash_files(manifest, known=known)
        manifest = split_rows(manifest, val_fraction=0.25, split_seed=0)

        self.before_decoding()
        makers = {"engine": engine.name, **self.versions}
        embedder = Embedder(manifest, store.catalogue.spec, lambda: engine, 2, Stopwatch(), makers)

        def describe_run(outcome: Outcome) -> Run:
            return Run(
                date="2026-01-02T03:04:05+00:00",
                computed=outcome.computed,
                reused=outcome.reused,
                checked=outcome.checked,
                copied_from=None,
                seconds={"total": float(outcome.computed)},
                engine=engine.name,
                device="cpu",
                batch_size=BATCH_SIZE,
                weights={"kind": "made"},
                machine={"cores": 2},
                versions=dict(self.versions),
            )

        return ExtractionRun(store, embedder, self.n_views, BATCH_SIZE, self.prove, describe_run).run()

    def features(self) -> dict[str, np.ndarray]:
        """Path -> what the cache serves."""
        assert self.folder is not None
        table = open_cache(self.folder).table()
        return dict(zip(table.paths, table.features, strict=True))


def write_photo(path: Path, seed: int) -> None:
    """A small PNG without a black pixel; equal seeds are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(1, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photographs in class folders: cat/0.png to cat/4.png (seeds 0 to 4), dog/5.png to dog/9.png."""
    folder = tmp_path / "pets"
    for seed in range(10):
        write_photo(folder / ("cat" if seed < 5 else "dog") / f"{seed}.png", seed)
    return folder


@pytest.fixture
def spec() -> ExtractSpec:
    return SPEC


@pytest.fixture
def extractor(photos: Path, tmp_path: Path) -> Extractor:
    return Extractor(photos, tmp_path / "cache")


@pytest.fixture
def draw() -> Callable[[Path, int], None]:
    return write_photo


@pytest.fixture
def make_engine() -> type[PositionedEngine]:
    return PositionedEngine
