"""Every byte of a cache folder proved, and all that is wrong named; HDF5's parser takes no part."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transfercache.cache.catalogue import ShardEntry
from transfercache.cache.contents import Contents, read_contents
from transfercache.cache.plain_file import MEND, REMAKE, read_plain
from transfercache.cache.shard import ShardReader, shard_digest
from transfercache.cache.store import LABELS, LOCK, is_begun
from transfercache.errors import CacheError, ResourceError
from transfercache.text import one_line

# A label is a few lines; one that is larger is not read to be refused.
_LABEL_BYTES = 1 << 16
# What is done sooner needs no bar.
_BAR_AFTER_SECONDS = 2.0


@dataclass(frozen=True)
class Verification:
    """What of a cache folder was proved, what lies beside it, and one line a problem."""

    cache: Path
    files: int  # proved whole: catalogue, rows, finished shards, labels
    bytes: int  # of these
    rows: int  # proved by their own checksums, those of unfinished shards included
    torn: int  # slots of unfinished shards that an interruption left half written: no problem, they are written again
    leftovers: tuple[str, ...]  # of crashes
    foreign: tuple[str, ...]  # names that are not tlc's
    problems: tuple[str, ...]


def verify_folder(folder: Path) -> Verification:
    """Prove every byte of every file of a cache folder, going on after a problem; takes no lock and writes nothing.

    Of an unfinished shard only the rows can be proved, as it has no digest yet. That a finished shard is read-only is
    not asked: copying loses it.
    """
    while True:
        contents = read_contents(folder)
        found = _prove(contents)
        # A writer may have replaced, between two reads, what was being proved.
        if not found.problems or _catalogue(read_contents(folder)) == _catalogue(contents):
            return found


def _catalogue(contents: Contents) -> bytes:
    return contents.catalogue.to_bytes() if contents.catalogue else b""


def _prove(contents: Contents) -> Verification:
    folder, problems = contents.folder, []
    is_only_begun = bool(contents.sizes) and is_begun(folder)
    if contents.problem and not is_only_begun:
        problems.append(contents.problem)
    for name, content in {**LABELS, LOCK: b""}.items():
        if name in contents.sizes:  # a copy may have left them out, and no reader needs them
            with _noted(problems, folder / name):
                if read_plain(folder / name, max_bytes=_LABEL_BYTES) != content:
                    raise CacheError(f"{folder / name}: holds what tlc did not write there; {REMAKE}")
    shards = contents.catalogue.shards if contents.catalogue else ()
    unproved = {*contents.leftovers, *(entry.file for entry in shards if not entry.finished)}
    proved = [name for name in contents.sizes if name not in unproved]
    rows = torn = 0
    with tqdm(
        total=contents.size_of(entry.file for entry in shards),
        desc=one_line(folder.name),
        unit="B",
        unit_scale=True,
        delay=_BAR_AFTER_SECONDS,
        leave=False,
        file=sys.stderr,
        disable=None,
    ) as bar:
        for entry in shards:
            n_valid, n_torn = _prove_shard(contents, entry, problems, bar)
            rows, torn = rows + n_valid, torn + n_torn
    return Verification(
        cache=folder,
        files=len(proved),
        bytes=contents.size_of(proved),
        rows=rows,
        torn=torn,
        leftovers=contents.leftovers,
        foreign=contents.foreign,
        problems=tuple(dict.fromkeys(problems)),
    )


@contextmanager
def _noted(problems: list[str], path: Path) -> Iterator[None]:
    """Add what goes wrong with `path` inside the block to `problems`, and go on."""
    try:
        yield
    except (CacheError, ResourceError) as error:
        problems.append(str(error))
    except OSError as error:  # a disk that fails
        problems.append(f"{path}: cannot be read ({error.strerror}); {REMAKE}")


def _prove_shard(contents: Contents, entry: ShardEntry, problems: list[str], bar: tqdm) -> tuple[int, int]:
    """Return how many rows of a shard are proved, and how many slots of an unfinished one are torn."""
    path = contents.folder / entry.file
    with _noted(problems, path):
        shard = ShardReader(path, entry)  # first: a file of holes would take for ever to hash
        # Then this: what a disk cannot read must not be read through the map.
        digest = shard_digest(path, entry, bar.update)
        valid = shard.valid()
        torn = np.flatnonzero(shard.written() & ~valid)
        if entry.finished and digest != entry.digest:
            problems.append(f"{path}: fails its checksum; {MEND}")
        if entry.finished and len(torn):
            problems.append(f"{path}: row {torn[0]}{_and_more(len(torn))} fails its checksum; {MEND}")
        _check_rows(contents, entry, shard)
        return int(valid.sum()), 0 if entry.finished else len(torn)
    return 0, 0


def _check_rows(contents: Contents, entry: ShardEntry, shard: ShardReader) -> None:
    """Raise CacheError where the rows file places a row in a slot that does not hold it."""
    rows = contents.rows
    if rows is None:
        return
    at = np.flatnonzero(rows.shard == entry.number)
    slots = rows.slot[at]
    wrong = at[~shard.written()[slots] | shard.differs(slots, rows.digest[at], rows.view[at])]
    if len(wrong):
        what = f"{rows.path[wrong[0]]}{_and_more(len(wrong))}"
        raise CacheError(f"{shard.path}: does not hold the features of {what}; {MEND}")


def _and_more(n: int) -> str:
    return f" and {n - 1} more" if n > 1 else ""
