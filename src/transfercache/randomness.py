"""One rule for randomness: a generator is derived from the root seed and what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends on the root seed and the purpose, and on nothing else."""
    text = "\x1f".join([str(int(seed)), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return numpy's default generator for this root seed and purpose, e.g. ``(0, "augment", epoch, row)``."""
    return np.random.default_rng(derive_seed(seed, *purpose))
