"""A linear softmax layer trained in torch, by AdamW or L-BFGS; its epochs are chosen by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional

from transfercache.arrays import Float32Array, Int64Array
from transfercache.cache.blocks import in_order
from transfercache.heads.problem import Affine, Chosen, Problem
from transfercache.heads.select import select
from transfercache.heads.standardise import Standardised
from transfercache.heads.threads import threads_for
from transfercache.randomness import derive_rng

#: At least this many rows a step; more where an epoch would then take over STEPS_PER_EPOCH steps, up to the second.
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 32, 512
STEPS_PER_EPOCH = 128
#: AdamW moves a weight by about its rate, and so a logit of D standardised features by about rate * sqrt(D): this.
LOGIT_STEP = 0.02
#: torch's default; what keeps the weights small is the number of epochs.
WEIGHT_DECAY = 0.01
#: Numbers of epochs that are tried: for AdamW as many as fit into MAX_STEPS steps, within these bounds.
MIN_EPOCHS, MAX_EPOCHS = 3, 60
MAX_STEPS = 2000
#: The same for L-BFGS, whose held-out loss turns within ten iterations on small sets (ants and bees: 6 to 8).
LBFGS_EPOCHS = 40
#: Where no class can be held out.
DEFAULT_EPOCHS = 20
#: Rows that are read from a file at once, and how many such chunks, drawn over the whole file, are mixed.
CHUNK_ROWS = 256
MIN_CHUNKS = 64


def fit_linear(problem: Problem) -> tuple[Affine, Chosen]:
    """Train from zero weights on standardised features for the number of epochs of lowest mean held-out log loss.

    Each fold is trained once and scored after every epoch; then all rows are trained on for the best number. An epoch
    of `adamw` is a pass in shuffled minibatches at a constant rate, so that its curve does not
    depend on where it ends; one of `lbfgs` is an iteration on all rows with a strong Wolfe line search. Bit-identical
    for a seed on one machine.
    """
    with threads_for(_multiplications(problem)):
        epochs, chosen = _choose_epochs(problem)
        *_, fitted = _train(problem, n_epochs=epochs)
    return fitted, {"epochs": epochs, "optimizer": problem.optimizer, **chosen, "standardised": True}


def _choose_epochs(problem: Problem) -> tuple[int, Chosen]:
    n_epochs = max_epochs(len(problem.targets), problem.optimizer)
    return select(
        problem,
        lambda fold: _train(fold, n_epochs=n_epochs),
        name="the number of epochs",
        grid=range(1, n_epochs + 1),
        default=DEFAULT_EPOCHS,
    )


def _multiplications(problem: Problem) -> int:
    """Count those of the logits in one step."""
    n_steps = 1 if problem.optimizer == "lbfgs" else n_batches(len(problem.targets))
    return problem.n_multiplications // n_steps


def max_epochs(n_rows: int, optimizer: str) -> int:
    """Return how many numbers of epochs are tried, from 1 on."""
    if optimizer == "lbfgs":
        return LBFGS_EPOCHS
    return max(MIN_EPOCHS, min(MAX_EPOCHS, MAX_STEPS // n_batches(n_rows)))


def n_batches(n_rows: int) -> int:
    """Return how many steps of AdamW make one epoch."""
    batch_size = min(max(n_rows // STEPS_PER_EPOCH, MIN_BATCH_SIZE), MAX_BATCH_SIZE)
    return math.ceil(n_rows / batch_size)


class _Layer:
    """The weights under training, from zero: the loss is convex."""

    def __init__(self, problem: Problem, rows: Standardised) -> None:
        self.rows = rows
        self.targets = torch.from_numpy(problem.targets)
        self.row_weights = torch.from_numpy(problem.row_weights).float()
        self.weight = torch.zeros(problem.n_targets, rows.shape[1])
        self.bias = torch.zeros(problem.n_targets)
        for parameter in (self.weight, self.bias):
            parameter.grad = torch.zeros_like(parameter)

    def add_gradients(self, x: torch.Tensor, rows: torch.Tensor | slice, n_rows: int) -> torch.Tensor:
        """Add the gradients of the weighted sum of losses over `n_rows`, x [B, D] being `rows`; returns that share.

        The gradient by the logits is (softmax - one-hot) * row weight / rows; writing it down takes a third of the
        time that autograd takes for a step this small.
        """
        assert self.weight.grad is not None
        assert self.bias.grad is not None
        targets, row_weights = self.targets[rows, None], self.row_weights[rows, None] / n_rows
        log_p = functional.log_softmax(torch.addmm(self.bias, x, self.weight.T), dim=1)
        slope = log_p.exp().scatter_add_(1, targets, torch.full_like(row_weights, -1.0)).mul_(row_weights)
        self.weight.grad.addmm_(slope.T, x)
        self.bias.grad.add_(slope.sum(dim=0))
        return -(log_p.gather(1, targets) * row_weights).sum()

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in (self.weight, self.bias):
            assert parameter.grad is not None
            parameter.grad.zero_()

    def full_loss(self) -> torch.Tensor:
        """Set the gradients of all rows; returns their weighted mean loss."""
        self.zero_gradients()
        n_rows = self.rows.shape[0]
        losses = [self.add_gradients(torch.from_numpy(x), place, n_rows) for place, x in in_order(self.rows)]
        return torch.stack(losses).sum()


def _train(problem: Problem, *, n_epochs: int) -> Iterator[Affine]:
    """Yield the map after each epoch, on raw embeddings."""
    rows = Standardised(problem.blocks, np.float32)
    layer = _Layer(problem, rows)
    run_epoch = _EPOCHS[problem.optimizer](layer, problem.seed)
    for _ in range(n_epochs):
        run_epoch()
        yield rows.scale.fold(layer.weight.double().numpy(), layer.bias.double().numpy())


def _adamw_epochs(layer: _Layer, seed: int) -> Callable[[], None]:
    n_rows, dim = layer.rows.shape
    optimizer = torch.optim.AdamW(
        [layer.weight, layer.bias], lr=LOGIT_STEP / math.sqrt(dim), weight_decay=WEIGHT_DECAY, fused=True
    )
    rng = derive_rng(seed, "linear")

    def run_epoch() -> None:
        for rows, x in minibatches(layer.rows, n_batches(n_rows), rng):
            layer.zero_gradients()
            layer.add_gradients(torch.from_numpy(x), torch.from_numpy(rows), len(rows))
            optimizer.step()

    return run_epoch


def _lbfgs_epochs(layer: _Layer, seed: int) -> Callable[[], None]:
    """Draws nothing, so `seed` moves its folds alone."""
    optimizer = torch.optim.LBFGS([layer.weight, layer.bias], max_iter=1, line_search_fn="strong_wolfe")

    def run_epoch() -> None:
        optimizer.step(layer.full_loss)

    return run_epoch


_EPOCHS = {"adamw": _adamw_epochs, "lbfgs": _lbfgs_epochs}


def minibatches(
    rows: Standardised, n_batches: int, rng: np.random.Generator
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield every row once, in `n_batches` of equal size to within a few rows: indices [B] and rows float32 [B, D].

    In memory all rows are shuffled. Else MIN_CHUNKS or more chunks of CHUNK_ROWS from all over the file are shuffled
    with each other: folders arrive sorted by class, and shuffling inside one block of such a file trains on one class
    after another.
    """
    n_rows = rows.shape[0]
    if rows.is_in_memory:
        # Equal sizes: a last batch of a few rows would be a noisy step.
        for index in np.array_split(rng.permutation(n_rows), n_batches):
            yield index, rows.take(index)
        return
    starts = rng.permutation(np.arange(0, n_rows, CHUNK_ROWS))
    mixtures = np.array_split(starts, max(1, len(starts) // MIN_CHUNKS))
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        # The next mixture is read while this one is trained on.
        ahead = reader.submit(_read_chunks, rows, mixtures[0])
        for following in [*mixtures[1:], None]:
            index, x = ahead.result()
            if following is not None:
                ahead = reader.submit(_read_chunks, rows, following)
            n_here = max(1, round(n_batches * len(index) / n_rows))
            for order in np.array_split(rng.permutation(len(index)), n_here):
                yield index[order], x[order]


def _read_chunks(rows: Standardised, starts: Int64Array) -> tuple[Int64Array, Float32Array]:
    """Return the row numbers [M] and the rows float32 [M, D] of the chunks that begin at `starts`."""
    chunks = [(int(start), min(int(start) + CHUNK_ROWS, rows.shape[0])) for start in starts]
    index = np.concatenate([np.arange(start, stop) for start, stop in chunks])
    return index, np.concatenate([rows.read(start, stop) for start, stop in chunks])
