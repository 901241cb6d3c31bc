"""The rows a head is trained on: a cache by its folder or its DATA, its labels and its split."""

from __future__ import annotations

import itertools
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.cache.reader import Cache, is_cache, open_cache
from transfercache.cache.table import FeatureTable
from transfercache.commands.inputs import cache_root, changed_words
from transfercache.errors import DataError, UsageError
from transfercache.overlay import overlay
from transfercache.splits import check_val_fraction, complete_split

if TYPE_CHECKING:
    from transfercache.commands.extract import Extraction
    from transfercache.images.manifest import Manifest

logger = logging.getLogger(__name__)


def open_cached(cache: str | Path | Extraction, *, backbone: str, weights: str, cache_dir: Path | str | None) -> Cache:
    """Open a cache folder, the result of an extraction, or the cache of DATA for this backbone and these weights.

    Raises CacheError, UsageError for a cache of activations, and DataError where DATA has no cache, or has changed
    since that was made.
    """
    folder = Path(cache) if isinstance(cache, (str, Path)) else cache.cache
    if is_cache(folder):
        opened = open_cache(folder)
        if opened.spec.row_shape is not None:
            raise UsageError(
                f"{folder}: holds activations of {opened.spec.boundary}, which no head takes; train the stages behind "
                f"them with: {shlex.join(('tlc', 'finetune', str(opened.data_root), '--cached', '--unfreeze'))} STAGES"
            )
        return opened
    # DATA: its files are listed, for which Pillow is loaded, and its cache is found by the weights' digest, for
    # which torch is loaded unless that is on record: a CACHE needs neither.
    from transfercache.images.sources import read_source

    manifest = read_source(folder)
    from transfercache.commands.extract import find_cache_of

    root = cache_root(cache_dir)
    found = find_cache_of(manifest, backbone=backbone, weights=weights, cache_dir=root)
    words = ["tlc", "extract-features", str(folder), "--backbone", backbone, "--weights", weights]
    words += [] if cache_dir is None else ["--cache-dir", str(cache_dir)]
    if found is None:
        raise DataError(f"{folder}: no cache of it for {backbone} under {root}; make it with: {shlex.join(words)}")
    opened = open_cache(found)
    spec = opened.spec
    words += changed_words(
        storage_dtype=(spec.storage_dtype, "float32"),
        compute=(spec.compute, "fp32"),
        decode=(spec.preprocessing.decoder, config.DECODE),
    )
    if _is_stale(opened, manifest):
        raise DataError(f"{folder}: has changed since {found} was made; bring that up to date: {shlex.join(words)}")
    n_relabelled = int(np.sum(opened.rows.label[opened.rows.view == 0] != manifest.labels))
    if n_relabelled:
        logger.warning(
            "%s: %d labels are not those of its cache, which are used (bring them over with: %s)",
            folder,
            n_relabelled,
            shlex.join(words),
        )
    return opened


def _is_stale(cache: Cache, manifest: Manifest) -> bool:
    """Whether the files, or the splits or classes that the data gives, are not those of the cache.

    Labels are not among them: those of the cache may be a label file's.
    """
    first = cache.rows.view == 0
    if tuple(itertools.compress(cache.rows.path, first)) != manifest.paths:
        return True
    if cache.catalogue.has_given_split != manifest.has_given_split:
        return True
    known = cache.rows.mtime_ns[first]  # -1 where the file was too young for its time to prove anything
    size, mtime_ns, _, _ = manifest.stat.T
    differs = (cache.rows.size[first] != size) | ((known >= 0) & (known != mtime_ns))
    if manifest.has_given_split:
        differs |= cache.rows.split[first] != manifest.split
    is_renamed = bool(manifest.class_names) and manifest.class_names != cache.class_names
    return is_renamed or bool(differs.any())


def labelled_table(
    cache: Cache, *, labels: Path | str | None, val_fraction: float | None, split_seed: int | None
) -> FeatureTable:
    """Return the good rows of a cache, their features not read yet, with a label file laid over, and their split.

    Where `val_fraction` or `split_seed` is given, the split is drawn anew, as extraction draws it. Rows that only the
    file labels are then split among themselves; where the data gives its split, they are in none.
    """
    if val_fraction is not None:
        check_val_fraction(val_fraction)
    table = cache.stored_table()
    is_redrawn = val_fraction is not None or split_seed is not None
    if is_redrawn and cache.catalogue.has_given_split:
        flag = "--split-seed" if val_fraction is None else "--val-fraction"
        raise UsageError(f"{flag}: the data of {cache.folder} gives its own split, which stays; leave the flag out")
    if labels is None and not is_redrawn:
        return table
    # Over all rows: the file may name bad images too, and the split is then the one that extraction draws.
    rows = cache.rows
    first = np.flatnonzero(rows.view == 0)
    content = rows.digest[first]

    def completed(split: npt.NDArray[np.uint8], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return complete_split(
            split,
            np.where(content.any(axis=1), codes, -1),
            rows.group[first],
            content,
            val_fraction=config.VAL_FRACTION if val_fraction is None else val_fraction,
            seed=config.SPLIT_SEED if split_seed is None else split_seed,
        )

    codes, class_names, split = rows.label[first], cache.class_names, rows.split[first]
    if is_redrawn:
        split = completed(np.zeros_like(split), codes)
    if labels is not None:
        codes, class_names = overlay([rows.path[i] for i in first], codes, class_names, Path(labels))
        split = split if cache.catalogue.has_given_split else completed(split, codes)
    return replace(table, labels=codes[table.row], class_names=class_names, split=split[table.row])
