"""All that a reader can be asked for, judged against what a cache held before somebody changed it; in bounded forks."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.neighbours import find_neighbours
from transfercache.cache.reader import Cache, open_cache
from transfercache.cache.slots import read_slots
from transfercache.cache.table import FeatureTable
from transfercache.cache.verify import verify_folder
from transfercache.errors import CacheError, DataError, ResourceError
from transfercache.splits import SPLIT_NAMES

from .hostile import DIM, SPEC

# What reading a cache of a few kilobytes may take, beside what the process has already.
MAX_BYTES = 512 << 20
# What one case takes is milliseconds.
MAX_SECONDS = 20

CLEAN = "clean"

Entry = tuple[str, int]  # path, view
Content = tuple[bytes, int]  # content digest, view
Known = tuple[bytes, int, int, int]  # features, label, split, group


@dataclass(frozen=True, eq=False)
class Original:
    """What a valid cache serves by path, and what all its computed slots hold by content."""

    served: dict[Entry, Known]
    held: dict[Content, bytes]

    @classmethod
    def of(cls, folder: Path) -> Original:
        slots = read_slots(folder, read_catalogue(folder).shards)
        keys = list(slots.held)
        held = {(key[:32], key[32]): row.tobytes() for key, row in zip(keys, slots.take(keys), strict=True)}
        return cls(_by_entry(open_cache(folder).table()), held)


class WrongRowError(Exception):
    """A reader was given what the cache never held."""


def read_all(folder: Path, original: Original, *, is_by_path: bool, is_by_content: bool) -> str:
    """Read everything there is; return CLEAN or the name of the error that the reader was given.

    `is_by_path`: the rows file is not the forger's, so that what is served must be just what was; `is_by_content`: no
    row's checksum is, so that what is served of a content must be its features. Raises WrongRowError where it is not,
    and lets any error through that a reader should not be given.
    """
    outcomes = []
    for read in (_read_cache, _read_slots, _read_neighbour):
        try:
            read(folder, original, is_by_path=is_by_path, is_by_content=is_by_content)
        except (CacheError, ResourceError) as error:
            outcomes.append(type(error).__name__)
    # Verify believes the checksum of a row that is not finite.
    if is_by_content:
        problems = verify_folder(folder).problems
        if outcomes and not problems:
            raise WrongRowError(f"{outcomes} for a reader, and verify finds nothing")
    return outcomes[0] if outcomes else CLEAN


def _read_cache(folder: Path, original: Original, *, is_by_path: bool, is_by_content: bool) -> None:
    cache = open_cache(folder)
    table = cache.table()
    if is_by_path and _by_entry(table) != original.served:
        raise WrongRowError("not the rows that were published")
    if is_by_content:
        good = np.flatnonzero(cache.rows.status == 0)
        contents = zip(cache.rows.digest[good], cache.rows.view[good].tolist(), table.features, strict=True)
        for digest, view, features in contents:
            if original.held.get((digest.tobytes(), view)) != features.tobytes():
                raise WrongRowError("not the features of its content")
    _ask_for_the_rest(cache)


def _ask_for_the_rest(cache: Cache) -> None:
    assert repr(cache)
    assert cache.spec.digest()
    assert len(cache.rows.known_files()) <= cache.n_rows
    assert 0 <= cache.n_bad <= cache.n_rows
    _ = cache.data_root, cache.class_names, cache.provenance
    for split in (None, *SPLIT_NAMES):
        try:
            features, labels = cache.arrays(split)
        except DataError:
            assert split is not None
            continue
        assert len(features) == len(labels)


def _read_slots(folder: Path, original: Original, *, is_by_path: bool, is_by_content: bool) -> None:
    slots = read_slots(folder, read_catalogue(folder).shards)
    keys = list(slots.held)
    if not keys:
        return
    for key, features in zip(keys, slots.take(keys), strict=True):
        if is_by_content and original.held.get((key[:32], key[32])) != features.tobytes():
            raise WrongRowError("a slot with what its content never had")


def _read_neighbour(folder: Path, original: Original, *, is_by_path: bool, is_by_content: bool) -> None:
    """As an extraction of other data beside it does; that passes over what it cannot trust."""
    wanted = {digest + bytes([view]) for digest, view in original.held}
    for neighbour in find_neighbours(folder.parent, SPEC, wanted, dim=DIM):
        assert sum(run.computed for run in neighbour.shares(1)) >= 0
        for key, features in zip(neighbour.keys, neighbour.slots.take(neighbour.keys), strict=True):
            if is_by_content and original.held[key[:32], key[32]] != features.tobytes():
                raise WrongRowError("a neighbour's row with what its content never had")


def _by_entry(table: FeatureTable) -> dict[Entry, Known]:
    columns = (table.labels.tolist(), table.split.tolist(), table.group.tolist())
    known = zip((row.tobytes() for row in table.features), *columns, strict=True)
    return dict(zip(zip(table.paths, table.view.tolist(), strict=True), known, strict=True))


def in_forks(
    work: Callable[[int], str], seeds: Iterable[int], *, per_fork: int, max_seconds: int = MAX_SECONDS
) -> Iterator[tuple[int, str]]:
    """Yield each seed with what `work` returned, or with how it ended: an error's traceback, a signal, a hang.

    A fork may take MAX_BYTES more than this process has (on Linux). One that dies is replaced by another, which goes on
    behind the seed at which it died.
    """
    left = list(seeds)
    while left:
        done = 0
        for outcome in _in_fork(work, left[:per_fork], max_seconds):
            yield left[done], outcome
            done += 1
        left = left[done:]


def _in_fork(work: Callable[[int], str], seeds: list[int], max_seconds: int) -> Iterator[str]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work(work, seeds, writing, max_seconds)
    os.close(writing)
    n_done = 0
    with open(reading, "rb") as answers:
        for line in answers:
            yield json.loads(line)
            n_done += 1
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if n_done < len(seeds):
        yield f"the process ended with {code}" + (" (it hung)" if code == -signal.SIGALRM else "")


def _work(work: Callable[[int], str], seeds: list[int], writing: int, max_seconds: int) -> NoReturn:
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _bound_memory()
        for seed in seeds:
            signal.alarm(max_seconds)
            os.write(writing, json.dumps(_outcome(work, seed)).encode() + b"\n")
        os._exit(0)
    finally:
        os._exit(1)


def _outcome(work: Callable[[int], str], seed: int) -> str:
    try:
        return work(seed)
    except Exception:  # noqa: BLE001 - any error at all is a finding, and shown
        return traceback.format_exc()


def _bound_memory() -> None:
    if sys.platform == "linux":
        n_pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (n_pages * resource.getpagesize() + MAX_BYTES, resource.RLIM_INFINITY))
