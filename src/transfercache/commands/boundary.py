"""Activations where a frozen part of a backbone ends: made once, for fine-tuning what lies behind it."""

from __future__ import annotations

import logging

import numpy as np

from transfercache.backbones.cut import frozen_part
from transfercache.backbones.registry import Backbone
from transfercache.commands.extract import Extraction, Extractor
from transfercache.errors import CacheError
from transfercache.finetuning.activations import Activations
from transfercache.finetuning.training import OnLine

logger = logging.getLogger(__name__)


def cache_activations(
    extractor: Extractor, backbone: Backbone, stage: str, *, on_line: OnLine | None = None
) -> tuple[Extraction, Activations]:
    """Make the cache of the images' activations at the end of `stage`, or find it, and open it.

    Raises what `extract_features` does.
    """
    extraction = extractor.extract(frozen_part(backbone, stage), on_engine=on_line or logger.info)
    cache = extraction.open()
    rows = cache.rows
    if not np.array_equal(rows.digest[rows.view == 0], extractor.manifest.digests):
        raise CacheError(f"{cache.folder}: another run has changed its rows meanwhile; run the same command again")
    return extraction, Activations(stage, cache.stored_table(), rows.bad)
