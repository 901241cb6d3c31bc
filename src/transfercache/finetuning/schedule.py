"""The learning rate over a run."""

from __future__ import annotations

import math

# Where the warm-up begins: from nothing, the first step of a short run would be wasted.
_WARMUP_FROM = 0.1


def rate_factor(schedule: str, progress: float, *, warmup: float) -> float:
    """Return what the highest rate is multiplied by when the share `progress` (0 to 1) of the run is done.

    In the share `warmup` of the run it rises linearly (Goyal et al. 2017, section 2.2). After that, cosine: half a
    period from 1 to 0 without restarts (Loshchilov and Hutter 2017, section 3).
    """
    if progress < warmup:
        return _WARMUP_FROM + (1.0 - _WARMUP_FROM) * progress / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
