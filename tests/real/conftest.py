from __future__ import annotations

from pathlib import Path

import pytest

from transfercache.commands.extract import Extraction, extract_features


@pytest.fixture(scope="session")
def extraction(real_photos: Path, real_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """The cache of all ants and bees: one pass of a ResNet-18, about twenty seconds on two cores."""
    return extract_features(real_photos, weights=str(real_weights), cache_dir=tmp_path_factory.mktemp("cache"))
