"""Strategies that train a network on the images: our fine-tuning, from three starts, and the tutorial's loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from transfercache import config
from transfercache.backbones.cut import share_behind
from transfercache.backbones.registry import Backbone
from transfercache.comparison.results import Seconds
from transfercache.comparison.strategy import Loop, Outcome, Setting, Source, Strategy, Work, extracted, uncached
from transfercache.comparison.tutorial import TUTORIAL_EPOCHS, TUTORIAL_WORKERS, train_tutorial
from transfercache.environment import n_cores
from transfercache.errors import DataError
from transfercache.finetuning.activations import Activations, boundary_before
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.precision import training_compute
from transfercache.finetuning.result import FinetuneResult
from transfercache.heads.fit import fit_head, pick_solver
from transfercache.heads.linear_head import LinearHead
from transfercache.stopwatch import Stopwatch

# Of `lp-ft`: the head that train-head fits unless told otherwise.
_HEAD = config.SOLVER


def finetuned() -> Strategy:
    """`tlc finetune` with its defaults."""
    return _strategy("finetune", Source.BACKBONE, lambda setting, options: _tune(setting, setting.backbone(), options))


def scratch() -> Strategy:
    """The same loop and rates from random weights: what the pretrained ones are worth.

    The first weights are the same for every seed; head, order and augmentation follow it. Batch norm is in train mode:
    frozen, it would normalise by the statistics of a network that has seen nothing.
    """
    return _strategy(
        "scratch",
        Source.ARCHITECTURE,
        lambda setting, options: _tune(setting, setting.random_backbone(), options),
        batch_norm="train",
    )


def probed_first() -> Strategy:
    """`tlc train-head`, then `tlc finetune --init-head` with its defaults (LP-FT, Kumar et al. 2022).

    Its first run pays for the extraction as those on cached embeddings do, and further ones for both trainings.
    """
    strategy = _strategy("lp-ft", Source.EMBEDDINGS, _tune_probed)
    head = {"head": _HEAD, "C": config.C, "class_weight": config.CLASS_WEIGHT}
    return replace(strategy, options=lambda setting: {**strategy.options(setting), **head, "views": setting.n_views})


def partial() -> Strategy:
    """`tlc finetune --cached --unfreeze` with the last stage: it alone trains, on cached activations.

    Its first run pays for the extraction as those on cached embeddings do.
    """

    def run(setting: Setting, seed: int) -> Outcome:
        backbone, options = setting.backbone(), _partial_options(setting, seed)
        embeddings, whole = setting.activations(backbone, boundary_before(backbone, options))
        rows = setting.rows
        for row in sorted(whole.bad.keys() & set(rows.row.tolist())):
            raise DataError(f"{rows.manifest.paths[np.searchsorted(rows.row, row)]}: {whole.bad[row]}")
        activations = Activations(whole.stage, rows.renumber(whole.table), {})
        result = _finetune(setting, backbone, options, activations=activations)
        return _extracted_first(result, embeddings.record, {})

    return Strategy(
        name="partial",
        source=Source.BACKBONE,
        run=run,
        options=_partial_key,
        work=_partial_work,
    )


def _partial_options(setting: Setting, seed: int) -> FinetuneOptions:
    last = setting.backbone().stages[-1].name
    return _options(setting, seed, unfreeze=last, augment="none")


def _partial_key(setting: Setting) -> dict[str, Any]:
    backbone, options = setting.backbone(), _partial_options(setting, 0)
    # Not the views and the storage dtype of the embeddings, if there are any.
    spec, n_views = setting.planned_activations(backbone, boundary_before(backbone, options))
    return {**_named(options), "activations": spec.digest(), "views": n_views}


def _partial_work(setting: Setting) -> Work:
    work, backbone, rows = _work(setting), setting.backbone(), setting.rows
    stage = boundary_before(backbone, _partial_options(setting, 0))
    share, (_, n_views) = share_behind(backbone, stage), setting.planned_activations(backbone, stage)
    forward = (rows.n_train + rows.n_reported) * n_views  # where their activations are not there yet
    return replace(work, trained=round(work.trained * share), forward=forward)


def _strategy(
    name: str, source: Source, run: Callable[[Setting, FinetuneOptions], Outcome], **changes: Any
) -> Strategy:
    """Return what runs with our defaults but for `changes`, and is kept under all of these options."""
    return Strategy(
        name=name,
        source=source,
        run=lambda setting, seed: run(setting, _options(setting, seed, **changes)),
        options=lambda setting: _named(_options(setting, 0, **changes)),
        work=_work,
    )


def _tune(setting: Setting, backbone: Backbone, options: FinetuneOptions) -> Outcome:
    result = _finetune(setting, backbone, options)
    return _outcome(result, uncached(result.seconds))


def _tune_probed(setting: Setting, options: FinetuneOptions) -> Outcome:
    pick_solver(_HEAD)  # what it imports is no part of the time that a head takes
    embeddings, watch = setting.embeddings(), Stopwatch()
    with watch.stage("load"):
        train, _ = setting.rows.divide(embeddings.table())
    with watch.stage("fit"):
        head = fit_head(train, solver=_HEAD, seed=options.seed)
    result = _finetune(setting, setting.backbone(), options, start=head)
    probing = watch.seconds()
    del probing["total"]
    return _extracted_first(result, embeddings.record, probing)


def _extracted_first(result: FinetuneResult, record: Mapping[str, Any], between: Mapping[str, float]) -> Outcome:
    """Return the outcome of a run that came after an extraction and what is `between`, in seconds by stage."""
    stages = {**between, **result.seconds, "total": sum(between.values()) + result.seconds["total"]}
    outcome = _outcome(result, extracted(record, stages))
    return replace(outcome, passes=outcome.passes + int(record["images"]), extraction=record)


def _options(setting: Setting, seed: int, **changes: Any) -> FinetuneOptions:
    compute = training_compute(config.COMPUTE, setting.device)
    return FinetuneOptions(epochs=setting.epochs, compute=compute, seed=seed, workers=setting.workers, **changes)


def _named(options: FinetuneOptions) -> dict[str, Any]:
    # The seed is in the key by itself, and the number of threads changes no bit.
    return {key: value for key, value in asdict(options).items() if key not in ("seed", "workers")}


def _work(setting: Setting) -> Work:
    loop = Loop(workers=setting.workers, compute=training_compute(config.COMPUTE, setting.device))
    return Work(setting.epochs * setting.rows.n_train, setting.rows.n_reported, loop)


def _finetune(
    setting: Setting,
    backbone: Backbone,
    options: FinetuneOptions,
    *,
    start: LinearHead | None = None,
    activations: Activations | None = None,
) -> FinetuneResult:
    rows = setting.rows
    result = finetune(
        rows.manifest,
        Task(backbone, setting.spec(backbone), setting.device, start, activations),
        options=options,
        on_epoch=lambda record: setting.on_epoch(record.epoch, options.epochs),
    )
    if result.bad:
        # All of them could be decoded before.
        raise DataError(f"{result.bad[0][0]}: it changed while it was being compared; run the same command again")
    return result


def _outcome(result: FinetuneResult, seconds: Seconds) -> Outcome:
    by_epoch = [
        {"train_loss": r.train_loss, "train_accuracy": r.train_accuracy, "seconds": r.seconds} for r in result.epochs
    ]
    return Outcome(result.probabilities, seconds, result.passes, {**result.head.chosen, "by_epoch": by_epoch})


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
    return min(TUTORIAL_WORKERS, max(0, n_cores() - 2))
