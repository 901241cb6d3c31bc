"""Rows of other caches of the same spec: moved data, curated subsets and slices are served from there, not computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from transfercache.cache.catalogue import Catalogue, read_catalogue
from transfercache.cache.contents import is_cache
from transfercache.cache.provenance import Run
from transfercache.cache.slots import RowKey, Slots, read_slots
from transfercache.cache.store import folder_pattern
from transfercache.errors import ArtefactError, ResourceError
from transfercache.spec import ExtractSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A cache folder, most often another one, and those of its rows that are asked for here."""

    folder: Path
    catalogue: Catalogue
    slots: Slots
    keys: list[RowKey]

    def shares(self, n_copied: int) -> list[Run]:
        """Return this cache's runs in proportion to the rows that were copied from it: their cost came with them."""
        runs = [run for run in self.catalogue.provenance if run.computed]
        # Its runs may have made more rows than are left, or be lacking for some.
        part = n_copied / max(len(self.slots.held), sum(run.computed for run in runs))
        ends = np.rint(np.cumsum([run.computed for run in runs]) * part).astype(int).tolist()
        return [
            replace(
                run,
                computed=end - start,
                reused=0,
                checked=0,
                copied_from=run.copied_from or self.folder.name,
                seconds={stage: seconds * (end - start) / run.computed for stage, seconds in run.seconds.items()},
            )
            for run, start, end in zip(runs, [0, *ends], ends, strict=False)
            if end > start
        ]


def find_neighbours(
    cache_dir: Path, spec: ExtractSpec, missing: Set[RowKey], *, dim: int, beside: Path | None = None
) -> Iterator[Neighbour]:
    """Yield the caches of this spec that hold rows of `missing`, each with those that it holds.

    Whoever asks takes out of `missing` what no further cache need be asked for. The folder `beside` which they lie is
    not among them. A cache that cannot be read is named in a warning and passed over: its rows are then computed.
    """
    for other in sorted(cache_dir.glob(folder_pattern(spec))):
        if not missing:
            return
        if other == beside or not is_cache(other):  # what is left of a removed one holds files of others
            continue
        try:
            catalogue = read_catalogue(other)
            if catalogue.spec != spec or catalogue.dim != dim:
                continue
            slots = read_slots(other, catalogue.shards)
        except (ArtefactError, ResourceError) as error:
            logger.warning("no rows are taken from %s (%s)", other.name, error)
            continue
        keys = [key for key in slots.held if key in missing]
        if keys:
            yield Neighbour(other, catalogue, slots, keys)
