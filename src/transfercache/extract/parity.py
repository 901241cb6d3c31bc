"""Whether rows made by other versions are still the rows that this machine would make: some are computed again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.catalogue import Catalogue
from transfercache.cache.slots import RowKey, Slots
from transfercache.errors import CacheError
from transfercache.extract.loop import Embedder, PendingView
from transfercache.randomness import derive_rng

#: Rows computed again; a changed kernel or resize moves every row, so that a few show it.
N_SAMPLED = 8
#: Rounding moves a cosine by 1e-7, float16 storage by 1e-6, another interpolation by 1e-3 and more.
MIN_COSINE = 0.9999


def check_parity(
    folder: Path,
    catalogue: Catalogue,
    slots: Slots,
    embedder: Embedder,
    wanted: Mapping[RowKey, tuple[int, int]],
    *,
    makers: Mapping[str, str],
) -> int:
    """Return how many held rows of `wanted` (key -> manifest row, view) were computed again; 0 where none need be.

    None need be where a run of this cache was already made, or checked, by `makers`, the engine and versions of now.
    Raises CacheError, naming both, where a row's cosine with its copy in the cache is below `MIN_COSINE`.
    """
    made_by = [run.makers for run in catalogue.provenance]
    held = [key for key in wanted if key in slots.held]
    if not held or dict(makers) in made_by:
        return 0
    chosen = derive_rng(0, "parity").permutation(len(held))[:N_SAMPLED].tolist()
    pending = [PendingView(slot, *wanted[held[i]]) for slot, i in enumerate(chosen)]
    stored = slots.take([held[i] for i in chosen])
    for batch in embedder.embed(pending, batch_size=len(pending)):
        # An image that can no longer be read is as far from its row as can be.
        cosines = dict.fromkeys(batch.bad, 0.0)
        for view, features in zip(batch.views, batch.features, strict=True):
            cosines[view.row] = min(cosines.get(view.row, 1.0), _cosine(features, stored[view.slot]))
        row, cosine = min(cosines.items(), key=lambda item: item[1])
        if cosine < MIN_COSINE:
            raise CacheError(
                f"{folder}: made by {_listed(made_by[-1] if made_by else {})}; here {_listed(makers)} computes other "
                f"embeddings (cosine {cosine:.5f} for {embedder.manifest.paths[row]}); install those versions, remove "
                "the folder to make it anew, or name another --cache-dir"
            )
    return len(pending)


def _cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return the cosine of two rows [D]; two rows of zeros are equal."""
    if np.array_equal(a, b):
        return 1.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length else 0.0


def _listed(makers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in makers.items()) or "unknown versions"
