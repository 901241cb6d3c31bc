"""The epochs of a run: steps, selection, checkpoints; stopped anywhere, it goes on to the same end."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from transfercache.arrays import Int64Array
from transfercache.backbones.devices import peak_memory_bytes, synchronize
from transfercache.errors import DataError, DivergenceError
from transfercache.finetuning.batches import Batch, Reader, leave_out
from transfercache.finetuning.checkpoints import Checkpoints, State
from transfercache.finetuning.result import EpochRecord
from transfercache.finetuning.rows import DividedRows
from transfercache.finetuning.trainer import Trainer
from transfercache.images.manifest import Manifest
from transfercache.stopwatch import Stopwatch

OnEpoch = Callable[[EpochRecord], None]
OnLine = Callable[[str], None]


def ignore(told: object) -> None:
    """Do nothing with what a run tells."""


@dataclass
class Progress:
    """How far a run has come: all of it that is not in the trainer."""

    epoch: int = 1  # under way, or the next one
    last_row: int | None = None  # of the batches that are done in it
    n_trained: int = 0  # images of them
    sums: list[torch.Tensor] = field(default_factory=list)  # of each batch its loss and number correct, float32 [2]
    bad_before: dict[int, str] = field(default_factory=dict)  # at its start: they are not in its order
    seconds: float = 0.0  # that earlier processes took for it
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None  # by --select
    best_state: dict[str, torch.Tensor] | None = None


@dataclass
class Run:
    """One run's parts, passed around together."""

    manifest: Manifest
    rows: DividedRows
    reader: Reader
    trainer: Trainer
    stopwatch: Stopwatch
    earlier_seconds: dict[str, float] = field(default_factory=dict)  # by stage, in earlier processes

    def seconds(self) -> dict[str, float]:
        """Return the seconds by stage and `total`, those of the processes before this one included."""
        now = self.stopwatch.seconds()
        return {name: now.get(name, 0.0) + self.earlier_seconds.get(name, 0.0) for name in now | self.earlier_seconds}


def train(
    run: Run, *, checkpoints: Checkpoints | None, on_epoch: OnEpoch, on_line: OnLine
) -> tuple[tuple[EpochRecord, ...], int]:
    """Run the schedule; leave the kept network as it was after the chosen epoch, and return that epoch."""
    options = run.trainer.options
    progress = Progress()
    state = None if checkpoints is None else checkpoints.newest()
    if state is not None:
        progress = _restore(run, state)
        on_line(f"going on after {progress.epoch - 1} epochs and {progress.n_trained} images of the next")
    while progress.epoch <= options.epochs and not _is_past_best(progress, options.patience):
        record = _run_epoch(run, progress, checkpoints)
        _finish_epoch(run, progress, record)
        if checkpoints is not None:
            checkpoints.write(_capture(run, progress), epoch=progress.epoch, n_trained=0)
        on_epoch(record)
    if progress.best_state is not None:
        run.trainer.kept.load_state_dict(progress.best_state)
    return tuple(progress.records), progress.best_epoch or len(progress.records)


def _is_past_best(progress: Progress, patience: int | None) -> bool:
    if patience is None or progress.best_epoch is None:
        return False
    return len(progress.records) - progress.best_epoch >= patience


def _run_epoch(run: Run, progress: Progress, checkpoints: Checkpoints | None) -> EpochRecord:
    trainer, epoch, n_epochs = run.trainer, progress.epoch, run.trainer.options.epochs
    if not progress.n_trained:
        progress.bad_before = dict(run.reader.bad)
    train_rows = run.rows.train
    rows = leave_out(train_rows, progress.bad_before)
    start = time.perf_counter() - progress.seconds
    batches = run.reader.training_batches(rows, epoch, after=progress.last_row)
    trainer.set_training()
    with closing(_shown(run, batches, len(rows), f"epoch {epoch}/{n_epochs}", n_done=progress.n_trained)) as shown:
        for batch in shown:
            done = (epoch - 1 + progress.n_trained / len(rows)) / n_epochs
            with run.stopwatch.stage("step"):
                labels = run.manifest.labels[batch.rows]
                progress.sums.append(trainer.step(batch, labels, epoch=epoch, progress=done))
            progress.n_trained += len(batch.rows)
            progress.last_row = int(batch.rows[-1])
            if checkpoints is not None and checkpoints.is_due():
                progress.seconds = time.perf_counter() - start
                checkpoints.write(_capture(run, progress), epoch=epoch, n_trained=progress.n_trained)
    with run.stopwatch.stage("step"):
        synchronize(trainer.device)
    seconds = time.perf_counter() - start
    if not progress.n_trained:
        raise _none_can_be_read(run, train_rows, "training")
    loss, correct = torch.stack(progress.sums).cpu().double().sum(dim=0).tolist()
    selection_loss, selection_accuracy = _select(run) if len(run.rows.held_out) else (None, None)
    record = EpochRecord(
        epoch=epoch,
        lr=trainer.rates((epoch - 1) / n_epochs),
        train_loss=loss / progress.n_trained,
        train_accuracy=correct / progress.n_trained,
        seconds=seconds,
        images_per_second=progress.n_trained / seconds,
        passes=trainer.passes,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        n_bad=len(run.reader.bad),
        selection_loss=selection_loss,
        selection_accuracy=selection_accuracy,
    )
    for what, value in (("loss", record.train_loss), ("held-out loss", selection_loss)):
        if value is not None and not math.isfinite(value):
            raise diverged(run, epoch, f"the {what} is {value}")
    return record


def _finish_epoch(run: Run, progress: Progress, record: EpochRecord) -> None:
    """Note a finished epoch, and stand before the next one."""
    loss = record.selection_loss
    if loss is not None:
        best = progress.best_epoch and progress.records[progress.best_epoch - 1].selection_loss
        if best is None or loss < best:
            progress.best_epoch, progress.best_state = record.epoch, copy.deepcopy(run.trainer.kept.state_dict())
    progress.records.append(record)
    progress.epoch, progress.n_trained, progress.last_row = record.epoch + 1, 0, None
    progress.sums, progress.seconds = [], 0.0


def diverged(run: Run, epoch: int, what: str) -> DivergenceError:
    """Return the error of a run in which numbers stopped being finite: `what` says which."""
    rates = ", ".join(f"--lr-{name} {rate:g}" for name, rate in run.trainer.options.learning_rates().items())
    return DivergenceError(
        f"epoch {epoch}: {what}; the rates are too high, give lower ones than {rates}",
        epoch=epoch,
        passes=run.trainer.passes,
        seconds=run.seconds()["total"],
    )


def _select(run: Run) -> tuple[float, float]:
    """Return log loss and accuracy on the held-out training rows, in the precision of training."""
    rows, logits = evaluate(run, run.rows.held_out, desc="select", compute=run.trainer.compute)
    if not len(rows):
        raise _none_can_be_read(run, run.rows.held_out, "held-out")
    labels = torch.from_numpy(run.manifest.labels[rows])
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return cross_entropy(logits, labels).item(), accuracy.item()


def _none_can_be_read(run: Run, rows: Int64Array, kind: str) -> DataError:
    first = int(rows[0])
    return DataError(
        f"{run.manifest.shown}: none of the {len(rows)} {kind} images can be read; "
        f"the first is {run.manifest.paths[first]}: {run.reader.bad[first]}"
    )


def evaluate(run: Run, rows: Int64Array, *, desc: str, compute: str = "fp32") -> tuple[Int64Array, torch.Tensor]:
    """Return those of `rows` that can be read, int64 [M], and their logits in eval mode, float64 [M, C]."""
    read = [rows[:0]]
    logits = [torch.zeros(0, len(run.manifest.class_names), dtype=torch.float64)]
    stage = run.stopwatch.stage("evaluate")
    with stage, closing(_shown(run, run.reader.eval_batches(rows), len(rows), desc)) as batches:
        for batch in batches:
            logits.append(run.trainer.forward_logits(batch.inputs, compute=compute))
            read.append(batch.rows)
            run.trainer.passes += len(batch.rows)
    return np.concatenate(read), torch.cat(logits)


def _shown(
    run: Run, batches: Generator[Batch, None, None], n_rows: int, desc: str, *, n_done: int = 0
) -> Generator[Batch, None, None]:
    """Pass `batches` on, and close them, under a progress bar that counts images, and shows passes and memory."""
    bar = tqdm(total=n_rows, initial=n_done, desc=desc, unit="image", leave=False, file=sys.stderr, disable=None)
    with closing(batches), bar:
        for batch in batches:
            yield batch
            peak = peak_memory_bytes(run.trainer.device) / 2**30
            bar.set_postfix_str(f"{run.trainer.passes} passes, {peak:.1f} GiB", refresh=False)
            bar.update(len(batch.rows))


def _capture(run: Run, progress: Progress) -> State:
    trainer = run.trainer
    of_device = [] if trainer.device.type == "cpu" else [torch.get_device_module(trainer.device).get_rng_state()]
    return {
        "network": trainer.network.state_dict(),
        "averaged": None if trainer.averaged is None else trainer.averaged.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "generators": [torch.get_rng_state(), *of_device],
        "passes": trainer.passes,
        "bad": dict(run.reader.bad),
        "seconds": run.seconds(),
        "progress": {**vars(progress), "records": [asdict(record) for record in progress.records]},
    }


def _restore(run: Run, state: State) -> Progress:
    trainer = run.trainer
    trainer.network.load_state_dict(state["network"])
    if trainer.averaged is not None:
        trainer.averaged.load_state_dict(state["averaged"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    own, *devices = state["generators"]
    torch.set_rng_state(own)
    for generator in devices:
        torch.get_device_module(trainer.device).set_rng_state(generator)
    trainer.passes = state["passes"]
    run.reader.bad.update(state["bad"])
    run.earlier_seconds = state["seconds"]
    kept: dict[str, Any] = state["progress"]
    sums = [item.to(trainer.device) for item in kept["sums"]]
    return Progress(**{**kept, "sums": sums, "records": [EpochRecord(**record) for record in kept["records"]]})
