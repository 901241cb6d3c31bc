"""The learning rate over a run."""

from __future__ import annotations

import math


def rate_factor(schedule: str, progress: float) -> float:
    """Return what the initial rate is multiplied by when the share `progress` (0 to 1) of the run is done.

    cosine: half a period from 1 to 0 without restarts (Loshchilov and Hutter 2017, section 3).
    """
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * progress))
