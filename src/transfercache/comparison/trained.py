"""Strategies that train a network on the images: our fine-tuning, the same from scratch, and the tutorial's loops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from transfercache import config
from transfercache.backbones.registry import Backbone
from transfercache.comparison.strategy import Loop, Outcome, Setting, Source, Strategy, Work, uncached
from transfercache.comparison.tutorial import TUTORIAL_EPOCHS, TUTORIAL_WORKERS, train_tutorial
from transfercache.errors import DataError
from transfercache.finetuning.loop import finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult


def finetuned() -> Strategy:
    """`tlc finetune` with its defaults."""
    return _ours("finetune", Source.BACKBONE, batch_norm=config.BATCH_NORM)


def scratch() -> Strategy:
    """The same loop and rates from random weights: what the pretrained ones are worth.

    The first weights are the same for every seed; head, order and augmentation follow it. Batch norm is in train mode:
    frozen, it would normalise by the statistics of a network that has seen nothing.
    """
    return _ours("scratch", Source.ARCHITECTURE, batch_norm="train")


def _ours(name: str, source: Source, *, batch_norm: str) -> Strategy:
    def options(setting: Setting, seed: int = 0) -> FinetuneOptions:
        return FinetuneOptions(epochs=setting.epochs, batch_norm=batch_norm, seed=seed, workers=setting.workers)

    def run(setting: Setting, seed: int) -> Outcome:
        backbone = setting.backbone() if source is Source.BACKBONE else setting.random_backbone()
        return _finetune(setting, backbone, options(setting, seed))

    def identity(setting: Setting) -> Mapping[str, Any]:
        # The seed is in the key by itself, and the number of threads changes no bit.
        named = asdict(options(setting))
        return {key: value for key, value in named.items() if key not in ("seed", "workers")}

    def work(setting: Setting) -> Work:
        trained = setting.epochs * setting.rows.n_train
        return Work(trained, setting.rows.n_reported, Loop(workers=setting.workers))

    return Strategy(name=name, source=source, run=run, options=identity, work=work)


def _finetune(setting: Setting, backbone: Backbone, options: FinetuneOptions) -> Outcome:
    rows = setting.rows
    result = finetune(
        rows.manifest,
        backbone,
        options=options,
        spec=setting.spec(backbone),
        device=setting.device,
        on_epoch=lambda record: setting.on_epoch(record.epoch, options.epochs),
    )
    if result.bad:
        path, reason = result.bad[0]
        raise DataError(f"{path}: {reason}; it changed while it was being compared, run the same command again")
    return Outcome(
        probabilities=result.probabilities,
        seconds=uncached(result.seconds),
        passes=result.passes,
        chosen={**result.head.chosen, "by_epoch": _curve(result)},
    )


def _curve(result: FinetuneResult) -> list[dict[str, float]]:
    return [
        {"train_loss": r.train_loss, "train_accuracy": r.train_accuracy, "seconds": r.seconds} for r in result.epochs
    ]


def tutorial(name: str, *, lr_backbone: float | None) -> Strategy:
    """One of the seed's loops; `lr_backbone` None freezes the convolutions, so that only the head takes gradients."""
    options = {
        "epochs": TUTORIAL_EPOCHS,
        "batch_size": config.SEED_BATCH_SIZE,
        "lr_backbone": lr_backbone,
        "lr_head": config.SEED_LR_HEAD,
    }

    def run(setting: Setting, seed: int) -> Outcome:
        rows, workers = setting.rows, _worker_processes()
        outcome = train_tutorial(
            rows.manifest,
            setting.backbone(),
            train=np.flatnonzero(rows.is_train),
            reported=np.flatnonzero(rows.is_reported),
            lr_backbone=lr_backbone,
            seed=seed,
            device=setting.device,
            workers=workers,
            on_epoch=setting.on_epoch,
        )
        return replace(outcome, chosen={**options, "worker_processes": workers, **outcome.chosen})

    def work(setting: Setting) -> Work:
        trained = TUTORIAL_EPOCHS * setting.rows.n_train
        evaluated = TUTORIAL_EPOCHS * setting.rows.n_reported
        loop = Loop(config.SEED_BATCH_SIZE, torch.contiguous_format, max(1, _worker_processes()))
        # A frozen backbone needs no gradients.
        return Work(0, trained + evaluated, loop) if lr_backbone is None else Work(trained, evaluated, loop)

    return Strategy(name, Source.BACKBONE, run=run, options=lambda setting: options, work=work)


def _worker_processes() -> int:
    """As many as the tutorial's four, where the machine has that many cores beside two for the network; else fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(TUTORIAL_WORKERS, max(0, cores - 2))
