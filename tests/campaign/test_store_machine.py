"""A machine that writes, kills, resumes, relabels, renames, adds and removes as it likes, beside a model in dicts."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

from transfercache.cache.catalogue import FILE_NAME, read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.slots import RowKey, read_slots
from transfercache.cache.upkeep import prune
from transfercache.errors import CacheError
from transfercache.extract.parity import N_SAMPLED
from transfercache.images.decode import decode_image
from transfercache.images.transforms import view_pixels

from ..extract.conftest import DIM, PREPROCESSING, Extractor
from ..killing import run_and_kill
from .conftest import find_problems, make_old

# Forking with threads about is safe here: the child runs no code but ours, and ends by _exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# An extraction of a few images makes some sixty calls that change a file, one of none that is new a dozen.
MAX_CALLS = 50
N_EXAMPLES, N_STEPS = 20, 30
CLASSES = ("cat", "dog")
MIN_PER_CLASS = 2
# Eight by eight pixels: every file is of one size.
SIDE = 8
SYNCS = ("fsync", "fdatasync")
JUNK = b"BM no image after all"

Published = dict[tuple[str, int], tuple[bytes, str]]  # path, view -> features, class name


class ProjectingEngine:
    """Embeds an image as whole numbers that depend on its pixels alone; fails, if told to, at a batch."""

    name = "projecting"
    _weights = np.random.default_rng(0).integers(0, 1000, (SIDE * SIDE * 3, DIM))

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.n_images, self._n_batches, self._fails_at = 0, 0, fails_at

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        if self._n_batches == self._fails_at:
            raise KeyboardInterrupt
        self._n_batches += 1
        self.n_images += int(pixels.any(axis=(1, 2, 3)).sum())
        # Below 2 ** 24 / 255: float32 holds each sum exactly.
        return (pixels.reshape(len(pixels), -1).astype(np.int64) @ self._weights % 65_521).astype(np.float32)


class Store(RuleBasedStateMachine):
    """A data folder, its cache, and what must be in there."""

    done: ClassVar[Counter[str]] = Counter()  # over all runs

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(dir=place))
        self.data, self.cache_dir = self.place / "pets", self.place / "cache"
        self.extractor = Extractor(self.data, self.cache_dir)
        self.seeds, self.names = itertools.count(), itertools.count()
        # The model: files by class and name, what each content and view is embedded as, which of these the cache
        # holds, and what it serves.
        self.files: dict[str, dict[str, bytes]] = {name: {} for name in CLASSES}
        self.embedded: dict[RowKey, bytes] = {}
        self.held: set[RowKey] = set()
        self.published: Published | None = None
        # A killed process loses nothing that it gave to the system, so that here a sync is time alone.
        self._patches = [mock.patch.object(os, name, _sync_nothing) for name in SYNCS if hasattr(os, name)]
        for patch in self._patches:
            patch.start()

    def teardown(self) -> None:
        for patch in self._patches:
            patch.stop()
        shutil.rmtree(self.place)

    # What happens to the data.

    @initialize()
    def begin(self) -> None:
        for name in CLASSES:
            self.add(name, 3)

    @rule(name=st.sampled_from(CLASSES), n=st.integers(1, 6))
    def add(self, name: str, n: int) -> None:
        for _ in range(n):
            self._put(name, self._new_name(), self._draw())

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def duplicate(self, name: str, index: int) -> None:
        chosen = self._choose(name, index)
        self._put(next(other for other in CLASSES if other != name), self._new_name(), self.files[name][chosen])

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def remove(self, name: str, index: int) -> None:
        if len(self.files[name]) > MIN_PER_CLASS:
            self._take(name, self._choose(name, index))

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def rename(self, name: str, index: int) -> None:
        self._move(name, self._choose(name, index), name, self._new_name())

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def relabel(self, name: str, index: int) -> None:
        """Move a file to the other class, under its own name."""
        if len(self.files[name]) > MIN_PER_CLASS:
            chosen = self._choose(name, index)
            self._move(name, chosen, next(other for other in CLASSES if other != name), chosen)

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def edit(self, name: str, index: int) -> None:
        """Other bytes of the same size, at the same time of modification."""
        chosen = self._choose(name, index)
        self._wait_for_another_ctime(self.data / name / chosen)
        self._put(name, chosen, self._draw())

    @rule(name=st.sampled_from(CLASSES), index=st.integers(0, 99))
    def spoil(self, name: str, index: int) -> None:
        """What was an image is none any more."""
        readable = [key for key, data in self.files[name].items() if data != JUNK]
        if len(readable) > MIN_PER_CLASS:
            self._wait_for_another_ctime(self.data / name / readable[index % len(readable)])
            self._put(name, readable[index % len(readable)], JUNK)

    @rule(n_views=st.integers(1, 3))
    def want_views(self, n_views: int) -> None:
        self.extractor.n_views = n_views

    # What happens to the cache.

    @rule()
    def extract(self) -> None:
        wanted, n_checked = self._wanted(), self._n_to_check()
        engine = ProjectingEngine()
        outcome = self.extractor.run(engine)
        assert (outcome.computed, outcome.checked) == (len(wanted - self.held), n_checked)
        assert engine.n_images == outcome.computed + n_checked
        assert outcome.reused == len(wanted & self.held)
        assert len(outcome.bad) == sum(data == JUNK for files in self.files.values() for data in files.values())
        self.held |= wanted
        self.published = self._target()
        assert self._held_on_disk() == self.held
        self._count("extract" if engine.n_images else "extract nothing")

    @rule(fails_at=st.integers(0, 4), n_new=st.integers(0, 9))
    def extract_and_interrupt(self, fails_at: int, n_new: int) -> None:
        self.add(CLASSES[n_new % 2], n_new)
        n_checked, engine = self._n_to_check(), ProjectingEngine(fails_at=fails_at)
        try:
            outcome = self.extractor.run(engine)
        except KeyboardInterrupt:
            held = self._held_on_disk()
            assert self.held <= held <= self.held | self._wanted()
            assert len(held - self.held) == max(engine.n_images - n_checked, 0)
            self._count("interrupt")
        else:
            held = self.held | self._wanted()
            assert outcome.computed == len(held - self.held)
            self.published = self._target()
            self._count("interrupt too late")
        self.held = held

    @rule(before_call=st.integers(0, MAX_CALLS), is_torn=st.booleans(), n_new=st.integers(0, 9))
    def extract_and_kill(self, before_call: int, is_torn: bool, n_new: int) -> None:
        self.add(CLASSES[n_new % 2], n_new)
        before, target = self.published, self._target()
        was_killed = run_and_kill(self._extract_in_fork, before_call=before_call, is_torn=is_torn)
        held = self._held_on_disk()
        assert self.held <= held <= self.held | self._wanted()
        served = self._served()
        assert served in ((before, target) if was_killed else (target,))
        self.held, self.published = held, served
        self._count("kill" if was_killed else "kill too late")

    @precondition(lambda self: self.published is not None)
    @rule()
    def prune(self) -> None:
        prune(self._folder(), dry_run=False)
        assert self.published is not None
        held = self._held_on_disk()
        assert held <= self.held
        assert {self.embedded[key] for key in held} >= {features for features, _ in self.published.values()}
        self._count("prune that frees" if held != self.held else "prune")
        self.held = held

    # What must be true whenever nothing is happening.

    @invariant()
    def nothing_is_wrong(self) -> None:
        folders = list(self.cache_dir.iterdir()) if self.cache_dir.exists() else []
        assert len(folders) <= 1
        assert [problem for folder in folders for problem in find_problems(folder)] == []

    @invariant()
    def what_is_served_is_what_was_published(self) -> None:
        assert self._served() == self.published

    @invariant()
    def every_slot_has_the_features_of_its_content(self) -> None:
        if self.held:
            folder = self._folder()
            slots = read_slots(folder, read_catalogue(folder).shards)
            keys = sorted(slots.held)
            expected = [self.embedded[key] for key in keys]
            assert [features.tobytes() for features in slots.take(keys)] == expected

    # How.

    def _count(self, what: str) -> None:
        self.done[what] += 1

    def _new_name(self) -> str:
        return f"{next(self.names):04}.bmp"

    def _draw(self) -> bytes:
        """The bytes of an image that there was none like; what each of its views is embedded as is noted."""
        pixels = np.random.default_rng(next(self.seeds)).integers(1, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        path = self.place / "drawn.bmp"
        Image.fromarray(pixels).save(path)
        data, engine = path.read_bytes(), ProjectingEngine()
        image, digest = decode_image(data, str(path)), hashlib.sha256(data).digest()
        for view in range(3):
            viewed = view_pixels(image, PREPROCESSING, digest=digest, view=view)
            self.embedded[digest + bytes([view])] = engine.embed(viewed[None])[0].tobytes()
        return data

    def _choose(self, name: str, index: int) -> str:
        return sorted(self.files[name])[index % len(self.files[name])]

    def _put(self, name: str, file: str, data: bytes) -> None:
        path = self.data / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        make_old(path)
        self.files[name][file] = data

    def _take(self, name: str, file: str) -> bytes:
        (self.data / name / file).unlink()
        return self.files[name].pop(file)

    def _move(self, name: str, file: str, other: str, new: str) -> None:
        (self.data / name / file).rename(self.data / other / new)
        self.files[other][new] = self.files[name].pop(file)

    def _wait_for_another_ctime(self, path: Path) -> None:
        """Wait until a change of this file gets another time: the file system's clock ticks every few milliseconds."""
        probe = self.place / "probe"
        while True:
            probe.write_bytes(b"")
            if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
                return

    def _target(self) -> Published:
        """What an extraction of the data as it is would publish."""
        return {
            (f"{name}/{file}", view): (self.embedded[_key(data, view)], name)
            for name, files in self.files.items()
            for file, data in files.items()
            for view in range(self.extractor.n_views)
            if data != JUNK
        }

    def _wanted(self) -> set[RowKey]:
        return {
            _key(data, view)
            for files in self.files.values()
            for data in files.values()
            for view in range(self.extractor.n_views)
            if data != JUNK
        }

    def _n_to_check(self) -> int:
        """How many rows the next extraction will compute again: while no run has said who made those that are held."""
        if not self.held or read_catalogue(self._folder()).provenance:
            return 0
        return min(len(self._wanted() & self.held), N_SAMPLED)

    def _folder(self) -> Path:
        (folder,) = self.cache_dir.iterdir()
        return folder

    def _held_on_disk(self) -> set[RowKey]:
        if not self.cache_dir.exists() or not list(self.cache_dir.glob(f"*/{FILE_NAME}")):
            return set()
        return set(read_slots(self._folder(), read_catalogue(self._folder()).shards).held)

    def _served(self) -> Published | None:
        """What a reader is given; None where it is told that there is nothing yet."""
        try:
            table = open_cache(next(iter(self.cache_dir.iterdir()))).table()
        except (FileNotFoundError, StopIteration):
            return None
        except CacheError as error:
            if "is not finished: run the same" in str(error) or "not a cache folder; make one" in str(error):
                return None
            raise
        rows = zip(table.paths, table.view.tolist(), table.features, table.labels.tolist(), strict=True)
        return {(path, view): (features.tobytes(), table.class_names[label]) for path, view, features, label in rows}

    def _extract_in_fork(self) -> None:
        self.extractor.run(ProjectingEngine())


def _sync_nothing(_: int) -> None:
    pass


def _key(data: bytes, view: int) -> RowKey:
    return hashlib.sha256(data).digest() + bytes([view])


def test_store__in_any_order_of_events(tmp_path: Path, scale: int, figures: list[str]) -> None:
    Store.done.clear()
    run_state_machine_as_test(
        lambda: Store(tmp_path),
        settings=settings(
            max_examples=N_EXAMPLES * scale,
            stateful_step_count=N_STEPS,
            # The same steps each time by default; --campaign looks further.
            derandomize=scale == 1,
            database=None,
            deadline=None,  # a step is an extraction, which takes as long as the machine lets it
            print_blob=True,
        ),
    )
    figures.append(f"store machine: {N_EXAMPLES * scale} runs of {N_STEPS} steps: {dict(sorted(Store.done.items()))}")
