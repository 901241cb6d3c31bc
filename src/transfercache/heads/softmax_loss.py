"""The loss of multinomial logistic regression and its gradient, in one fused pass over the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Float64Array, Int64Array
from transfercache.heads.standardise import Standardised
from transfercache.heads.threads import share_rows

#: loss; gradient [K, D + 1]
LossAndGradient = tuple[float, Float64Array]


class SoftmaxLoss:
    """mean_i w_i (logsumexp(z_i) - z_i[y_i]) with z = x W' + b, for parameters [K, D + 1] = (W, b); over sum w.

    Logits, softmax and both products of a block are formed while it is in the processor's cache. The caller keeps BLAS
    to one thread. Sums over blocks are float64, what is inside a block has the dtype of the rows.
    """

    def __init__(self, rows: Standardised, targets: Int64Array, row_weights: Float64Array) -> None:
        self.n_passes = 0
        self._rows, self._targets = rows, targets
        self._weights, self._total = row_weights, float(row_weights.sum())

    def __call__(self, parameters: Float64Array) -> LossAndGradient:
        """Return the loss and its gradient, float64 [K, D + 1]."""
        self.n_passes += 1
        n_rows = self._rows.shape[0]
        weight = np.ascontiguousarray(parameters[:, :-1], self._rows.dtype)
        bias = parameters[:, -1].astype(self._rows.dtype)

        def add_up(blocks: list[slice]) -> LossAndGradient:
            loss, gradient = 0.0, np.zeros(parameters.shape)
            for block in blocks:
                x = self._rows.read(block.start, block.stop)  # [B, D]
                z = x @ weight.T  # [B, K]
                z += bias
                weights = self._weights[block]
                loss += float(_losses_and_residuals(z, self._targets[block], weights.astype(z.dtype)) @ weights)
                gradient[:, :-1] += z.T @ x
                gradient[:, -1] += np.ones(len(z), z.dtype) @ z
            return loss, gradient

        sums = share_rows(n_rows, n_rows * parameters.size, add_up)
        gradient = np.sum([gradient for _, gradient in sums], axis=0)
        gradient /= self._total
        return sum(loss for loss, _ in sums) / self._total, gradient


def _losses_and_residuals(z: npt.NDArray[Any], targets: Int64Array, row_weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the losses [B] of logits [B, K], which are replaced by softmax minus one-hot, the gradient, times weights.

    Both are sums over the other classes, so that rows near certainty keep their digits: 1 - p would have none left.
    """
    at = np.arange(len(z)), targets
    z -= z.max(axis=1, keepdims=True)
    logit = z[at]
    # A class of less than this changes no sum, but would be a subnormal number, which matrix products crawl over.
    np.maximum(z, 0.75 * np.log(np.finfo(z.dtype).tiny), out=z)
    np.exp(z, out=z)
    own = z[at]
    z[at] = 0
    others = z @ np.ones(z.shape[1], z.dtype)  # a third of the time of a sum
    total = own + others
    scale = row_weights / total
    z *= scale[:, None]
    z[at] = -others * scale
    # Where the target's own term underflows, or nearly, its logit says the same without a division by it.
    is_likely = logit > -1
    return np.asarray(np.where(is_likely, np.log1p(others / np.where(is_likely, own, 1)), np.log(total) - logit))
