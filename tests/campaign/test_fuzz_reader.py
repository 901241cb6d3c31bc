"""Thousands of mutated caches: a reader is given what was published, or an error that says so, and nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from . import hostile
from .mutations import mutate
from .reading import CLEAN, Original, in_forks, read_all

# Forking with threads about is safe here: the child runs no code but ours, and ends by _exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

N_CASES = 600
PER_FORK = 100
ALLOWED = (CLEAN, "CacheError")


def test_reader__of_mutated_caches(tmp_path: Path, scale: int, figures: list[str]) -> None:
    valid = hostile.make_cache(tmp_path / "valid")
    original = Original.of(valid)
    assert read_all(valid, original, is_by_path=True, is_by_content=True) == CLEAN

    def read(seed: int) -> str:
        folder = tmp_path / str(seed) / valid.name
        try:
            shutil.copytree(valid, folder)
            mutation = mutate(folder, seed)
            return read_all(
                folder,
                original,
                is_by_path=not mutation.is_rows_forged,
                is_by_content=not mutation.is_content_forged,
            )
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    outcomes, failures = Counter[str](), []
    for seed, outcome in in_forks(read, range(N_CASES * scale), per_fork=PER_FORK):
        if outcome in ALLOWED:
            outcomes[outcome] += 1
        else:
            failures.append(f"seed {seed}, {_described(tmp_path / 'again', valid, seed)}:\n{outcome}")
    figures.append(f"mutated caches: {sum(outcomes.values()) + len(failures)} read, {dict(outcomes)}")
    assert not failures, f"{len(failures)} failed; the first:\n" + "\n".join(failures[:5])
    assert outcomes.total() == N_CASES * scale
    # Most changes are refused; some touch what no reader needs.
    assert outcomes[CLEAN] < outcomes["CacheError"]


def _described(place: Path, valid: Path, seed: int) -> str:
    """What a seed does to a cache."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(valid, place / valid.name)
    return "; ".join(mutate(place / valid.name, seed).done)
