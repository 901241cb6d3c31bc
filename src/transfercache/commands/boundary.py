"""Activations where a frozen part of a backbone ends: made once, for fine-tuning what lies behind it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from transfercache.backbones.choice import Choice
from transfercache.backbones.cut import frozen_part
from transfercache.backbones.registry import Backbone
from transfercache.commands.extract import Extraction, extract_manifest
from transfercache.commands.inputs import EmbedOptions
from transfercache.errors import CacheError
from transfercache.finetuning.activations import Activations
from transfercache.finetuning.training import OnLine
from transfercache.images.manifest import Manifest

logger = logging.getLogger(__name__)


def cache_activations(
    manifest: Manifest,
    backbone: Backbone,
    stage: str,
    *,
    cache_dir: Path,
    options: EmbedOptions,
    choice: Choice,
    hash_seconds: float,
    on_line: OnLine | None = None,
) -> tuple[Extraction, Activations]:
    """Make the cache of a hashed manifest's activations at the end of `stage`, or find it, and open it.

    Raises what `extract_features` does.
    """
    extraction = extract_manifest(
        manifest,
        frozen_part(backbone, stage),
        cache_dir=cache_dir,
        options=options,
        choice=choice,
        hash_seconds=hash_seconds,
        on_engine=on_line or logger.info,
    )
    cache = extraction.open()
    rows = cache.rows
    if not np.array_equal(rows.digest[rows.view == 0], manifest.digests):
        raise CacheError(f"{cache.folder}: another run has changed its rows meanwhile; run the same command again")
    return extraction, Activations(stage, cache.stored_table(), rows.bad)
