"""Temperature scaling: one number over all logits, so that probabilities say how often the head is right."""

from __future__ import annotations

import numpy as np

from transfercache.arrays import Float32Array, Float64Array, Int64Array
from transfercache.heads.linear_head import UNTRAINED_BIAS
from transfercache.metrics import softmax

#: Logits further off than this are no head's; a minimum beyond is the sign that there is none.
MAX_FACTOR = 1000.0
#: Of the temperature; logits are float32.
TOLERANCE = 1e-7
#: Newton takes some six steps; halving the bracket alone would take thirty.
MAX_STEPS = 50


def fit_temperature(logits: Float32Array, targets: Int64Array) -> float | None:
    """Return the T of lowest mean log loss of softmax(logits / T), as Guo et al. 2017 (section 4.2) calibrate.

    `logits` [M, C] are of rows that took no part in the fit, `targets` [M]; classes without training rows are left out,
    whose logits no T divides. The loss is convex in 1 / T, which Newton's method finds inside a bracket. None where no
    T within a factor of a thousand is a minimum: the rows then say nothing, as they are all right (the loss falls for
    ever as T does) or no better than chance.
    """
    # Relative to the target's, the logits z have the loss ln sum exp(z / T).
    z = logits.astype(np.float64)
    z -= z[np.arange(len(z)), targets][:, None]
    z = z[:, (logits != UNTRAINED_BIAS).any(axis=0)]
    low, high = 1 / MAX_FACTOR, MAX_FACTOR  # of b = 1 / T
    if _derivatives(z, low)[0] >= 0 or _derivatives(z, high)[0] <= 0:
        return None
    b = 1.0
    for _ in range(MAX_STEPS):
        slope, curvature = _derivatives(z, b)
        low, high = (b, high) if slope < 0 else (low, b)
        newton = b - slope / max(curvature, np.finfo(np.float64).tiny)
        following = newton if low < newton < high else (low * high) ** 0.5
        if abs(following - b) <= TOLERANCE * b:
            break
        b = following
    return 1 / b


def _derivatives(z: Float64Array, b: float) -> tuple[float, float]:
    """Return the first two derivatives by b of the mean of ln sum exp(b z) over the rows of z [M, C]."""
    p = softmax(b * z)
    mean = np.einsum("mc,mc->m", p, z)
    square = np.einsum("mc,mc,mc->m", p, z, z)
    return float(mean.mean()), float((square - mean**2).mean())
