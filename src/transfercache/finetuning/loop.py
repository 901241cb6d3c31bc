"""Fine-tuning on images: a fixed schedule over the training rows, then one reading of the reported split."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import full_float32
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.backbones.weights import seeded
from transfercache.errors import DataError, UsageError
from transfercache.finetuning.batches import Batch, ImageReader
from transfercache.finetuning.groups import ParameterGroup, describe_groups
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import EpochRecord, FinetuneResult
from transfercache.finetuning.rows import DividedRows, divide_rows
from transfercache.finetuning.trainer import Trainer, build_trainer
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest
from transfercache.randomness import derive_seed
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch

Int64Array = npt.NDArray[np.int64]
OnEpoch = Callable[[EpochRecord], None]


@dataclass
class _Run:
    """One run's parts, passed around together."""

    manifest: Manifest
    rows: DividedRows
    reader: ImageReader
    trainer: Trainer


@dataclass(frozen=True)
class _Best:
    epoch: int
    loss: float
    state: dict[str, torch.Tensor]


def finetune(
    manifest: Manifest,
    backbone: Backbone,
    *,
    options: FinetuneOptions,
    spec: ExtractSpec,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
) -> FinetuneResult:
    """Train a copy of `backbone` with a new head on the training rows, and evaluate it once on the reported ones.

    The same seed gives the same bits on the same machine's CPU, whatever `options.workers`. `backbone` stays as it
    was; `spec` goes into the head. An unreadable image is listed in the result's `bad`; from the epoch that met it on
    it is left out, and the run goes on. Raises DataError where nothing can train, UsageError for a stage that the
    backbone does not have and for rates at which the loss stops being a number.
    """
    stopwatch = Stopwatch()
    groups = describe_groups(backbone, options, n_classes=len(manifest.class_names))
    rows = divide_rows(manifest, select=options.select, seed=options.seed)
    network = network_with_head(backbone, len(manifest.class_names), seed=options.seed)
    trainer = build_trainer(network, backbone, groups, options=options, device=device, stopwatch=stopwatch)
    run = _Run(manifest, rows, ImageReader(manifest, backbone.preprocessing, options, stopwatch), trainer)
    with full_float32():
        with _seeded(device, derive_seed(options.seed, "dropout")):
            epochs, chosen_epoch = _train(run, on_epoch)
        reported_rows, logits = _evaluate(run, rows.reported, desc="evaluate")
        canary_logits = trainer.forward_logits(canary_pixels(backbone.preprocessing.crop))
    network.to("cpu").to(memory_format=torch.contiguous_format)
    bad = run.reader.bad
    return FinetuneResult(
        network=network,
        head=_linear_head(run, backbone, groups=groups, spec=spec, chosen_epoch=chosen_epoch),
        backbone_tensors=_trunk_tensors(network, backbone.head_path),
        groups=groups,
        epochs=epochs,
        chosen_epoch=chosen_epoch,
        n_train_per_class=_count_trained(run),
        reported_rows=reported_rows,
        probabilities=torch.softmax(logits, dim=1).numpy(),
        bad=tuple((manifest.paths[row], bad[row]) for row in sorted(bad)),
        passes=trainer.passes,
        seconds=stopwatch.seconds(),
        canary_logits=canary_logits.float().numpy(),
    )


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw torch's random numbers (dropout) from `seed` inside the block; global generators are left as they were."""
    if device.type == "cpu":
        with seeded(seed):
            yield
        return
    accelerators = list(range(torch.get_device_module(device).device_count()))
    with torch.random.fork_rng(devices=accelerators, device_type=device.type):
        torch.manual_seed(seed)
        yield


def _train(run: _Run, on_epoch: OnEpoch | None) -> tuple[tuple[EpochRecord, ...], int]:
    """Run the whole schedule; leave the network as it was after the chosen epoch, and return that epoch."""
    n_epochs = run.trainer.options.epochs
    records: list[EpochRecord] = []
    best: _Best | None = None
    for epoch in range(1, n_epochs + 1):
        record = _run_epoch(run, epoch)
        records.append(record)
        if on_epoch is not None:
            on_epoch(record)
        if record.selection_loss is not None and (best is None or record.selection_loss < best.loss):
            best = _Best(epoch, record.selection_loss, copy.deepcopy(run.trainer.network.state_dict()))
    if best is None:
        return tuple(records), n_epochs
    run.trainer.network.load_state_dict(best.state)
    return tuple(records), best.epoch


def _run_epoch(run: _Run, epoch: int) -> EpochRecord:
    n_epochs = run.trainer.options.epochs
    rows = run.reader.readable(run.rows.train)
    start = time.perf_counter()
    with closing(_shown(run.reader.training_batches(rows, epoch), len(rows), f"epoch {epoch}/{n_epochs}")) as batches:
        totals = run.trainer.train_epoch(batches, run.manifest.labels, epoch=epoch, n_rows=len(rows))
    seconds = time.perf_counter() - start
    if not totals.n_rows:
        raise _none_can_be_read(run, run.rows.train, "training")
    selection_loss, selection_accuracy = _select(run) if len(run.rows.held_out) else (None, None)
    if not math.isfinite(totals.loss) or not math.isfinite(selection_loss or 0.0):
        rates = ", ".join(f"--lr-{name} {rate:g}" for name, rate in run.trainer.rates(0.0).items())
        raise UsageError(
            f"epoch {epoch}: the loss is {totals.loss}; the rates are too high, give lower ones than {rates}"
        )
    return EpochRecord(
        epoch=epoch,
        lr=run.trainer.rates((epoch - 1) / n_epochs),
        train_loss=totals.loss,
        train_accuracy=totals.accuracy,
        seconds=seconds,
        images_per_second=totals.n_rows / seconds,
        selection_loss=selection_loss,
        selection_accuracy=selection_accuracy,
    )


def _select(run: _Run) -> tuple[float, float]:
    """Return log loss and accuracy on the held-out training rows."""
    rows, logits = _evaluate(run, run.rows.held_out, desc="select")
    if not len(rows):
        raise _none_can_be_read(run, run.rows.held_out, "held-out")
    labels = torch.from_numpy(run.manifest.labels[rows])
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return cross_entropy(logits, labels).item(), accuracy.item()


def _none_can_be_read(run: _Run, rows: Int64Array, kind: str) -> DataError:
    first = int(rows[0])
    return DataError(
        f"{run.manifest.root}: none of the {len(rows)} {kind} images can be read; "
        f"the first is {run.manifest.paths[first]}: {run.reader.bad[first]}"
    )


def _evaluate(run: _Run, rows: Int64Array, *, desc: str) -> tuple[Int64Array, torch.Tensor]:
    """Return those of `rows` that can be read, int64 [M], and their logits in eval mode, float64 [M, C]."""
    read = [rows[:0]]
    logits = [torch.zeros(0, len(run.manifest.class_names), dtype=torch.float64)]
    stage = run.trainer.stopwatch.stage("evaluate")
    with stage, closing(_shown(run.reader.eval_batches(rows), len(rows), desc)) as batches:
        for batch in batches:
            logits.append(run.trainer.forward_logits(batch.pixels))
            read.append(batch.rows)
            run.trainer.passes += len(batch.rows)
    return np.concatenate(read), torch.cat(logits)


def _shown(batches: Iterator[Batch], n_rows: int, desc: str) -> Generator[Batch, None, None]:
    """Pass `batches` on under a progress bar that counts images."""
    with tqdm(total=n_rows, desc=desc, unit="image", leave=False, file=sys.stderr, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.rows))


def _count_trained(run: _Run) -> Int64Array:
    """Return int64 [C]: the training images of each class that could be read."""
    labels = run.manifest.labels[run.reader.readable(run.rows.train)]
    return np.bincount(labels, minlength=len(run.manifest.class_names))


def _linear_head(
    run: _Run, backbone: Backbone, *, groups: tuple[ParameterGroup, ...], spec: ExtractSpec, chosen_epoch: int
) -> LinearHead:
    options = run.trainer.options
    by = "fixed schedule" if options.select is None else f"log loss on {options.select:g} of the training rows"
    linear = run.trainer.network.get_submodule(backbone.head_path)
    tensors = {name: tensor.detach().numpy().copy() for name, tensor in linear.named_parameters()}
    return LinearHead(
        weight=tensors["weight"],
        bias=tensors["bias"],
        class_names=run.manifest.class_names,
        spec=spec,
        solver="finetune",
        n_train=int(_count_trained(run).sum()),
        chosen={
            "epoch": chosen_epoch,
            "epochs": options.epochs,
            "by": by,
            "batch_size": options.batch_size,
            "schedule": options.schedule,
            "batch_norm": options.batch_norm,
            "seed": options.seed,
            "groups": [{**asdict(group), "stages": list(group.stages)} for group in groups],
        },
    )


def _trunk_tensors(network: nn.Module, head_path: str) -> dict[str, npt.NDArray[Any]]:
    return {
        name: tensor.numpy() for name, tensor in network.state_dict().items() if not name.startswith(f"{head_path}.")
    }
