"""Whether rows made by other versions are still the rows that this machine would make: some are computed again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.neighbours import Neighbour, find_neighbours
from transfercache.cache.provenance import vouch
from transfercache.cache.slots import RowKey
from transfercache.errors import CacheError
from transfercache.extract.loop import Embedder, PendingView
from transfercache.randomness import derive_rng

logger = logging.getLogger(__name__)

#: Rows computed again; a changed kernel or resize moves every row, so that a few show it.
N_SAMPLED = 8
#: By precision. Rounding moves a cosine by 1e-7, float16 storage by 1e-6, another interpolation by 2e-3 and more; two
#: engines that both compute in bfloat16 differ by 1e-4 (docs/decisions/0011-one-cpu-engine.md).
MIN_COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}


def check_parity(cache: Neighbour, embedder: Embedder, wanted: Mapping[RowKey, tuple[int, int]]) -> int:
    """Return how many of the `keys` that the cache holds were computed again, by `wanted` (key -> manifest row, view).

    None need be where all its rows were made, or found equal, by the embedder's `makers`. Raises CacheError, naming
    both, where a row's cosine with its copy in the cache is below its `MIN_COSINE`.
    """
    makers = embedder.makers
    if vouch(cache.catalogue.provenance, makers):
        return 0
    held = [key for key in cache.keys if key in cache.slots.held]
    if not held:
        return 0
    made_by = [run.makers for run in cache.catalogue.provenance if run.makers != dict(makers)]
    chosen = derive_rng(0, "parity").permutation(len(held))[:N_SAMPLED].tolist()
    pending = [PendingView(slot, *wanted[held[i]]) for slot, i in enumerate(chosen)]
    stored = cache.slots.take([held[i] for i in chosen])
    for batch in embedder.embed(pending, batch_size=len(pending)):
        # An image that can no longer be read is as far from its row as can be.
        cosines = dict.fromkeys(batch.bad, 0.0)
        for view, features in zip(batch.views, batch.features, strict=True):
            cosines[view.row] = min(cosines.get(view.row, 1.0), _cosine(features, stored[view.slot]))
        row, cosine = min(cosines.items(), key=lambda item: item[1])
        if cosine < MIN_COSINE[embedder.spec.compute]:
            raise CacheError(
                f"{cache.folder}: made by {_listed(made_by[-1] if made_by else {})}; here {_listed(makers)} computes "
                f"other embeddings (cosine {cosine:.5f} for {embedder.manifest.paths[row]}); install those versions, "
                "remove the folder to make it anew, or name another --cache-dir"
            )
    return len(pending)


def trusted_neighbours(
    cache_dir: Path,
    embedder: Embedder,
    wanted: Mapping[RowKey, tuple[int, int]],
    *,
    dim: int,
    beside: Path | None = None,
) -> Iterator[tuple[Neighbour, int]]:
    """Yield the caches that hold rows of `wanted`, each with those that none before it gave, and how many were checked.

    One whose rows this machine would make otherwise is named in a warning and passed over; see also `find_neighbours`.
    """
    missing = set(wanted)
    for neighbour in find_neighbours(cache_dir, embedder.spec, missing, dim=dim, beside=beside):
        try:
            n_checked = check_parity(neighbour, embedder, wanted)
        except CacheError as error:
            logger.warning("computed instead of taken from there: %s", error)
            continue
        missing.difference_update(neighbour.keys)  # not those of one that is refused: another may hold them
        yield neighbour, n_checked


def _cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return the cosine of two rows [D]; two rows of zeros are equal."""
    if np.array_equal(a, b):
        return 1.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length else 0.0


def _listed(makers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in makers.items()) or "unknown versions"
