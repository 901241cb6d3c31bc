"""Fine-tuning on images: a fixed schedule over the training rows, then one reading of the reported split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.devices import forget_peak_memory, memory_errors
from transfercache.backbones.engines import full_float32, normalise
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.backbones.weights import seeded
from transfercache.finetuning.activations import ActivationReader, Activations, part_behind
from transfercache.finetuning.batches import ImageReader, Reader
from transfercache.finetuning.checkpoints import Checkpoints
from transfercache.finetuning.groups import ParameterGroup, describe_groups
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.precision import describe_compute, training_compute
from transfercache.finetuning.result import FinetuneResult
from transfercache.finetuning.rows import divide_rows
from transfercache.finetuning.start import head_digest, match_head, put_head
from transfercache.finetuning.trainer import Trainer, build_trainer
from transfercache.finetuning.training import OnEpoch, OnLine, Run, evaluate, train
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest
from transfercache.randomness import derive_seed
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch
from transfercache.text import name_flag

# Of what a checkpoint holds; one of another number is of another run.
_CHECKPOINT_FORMAT = 2


def finetune(
    manifest: Manifest,
    backbone: Backbone,
    *,
    options: FinetuneOptions,
    spec: ExtractSpec,
    device: torch.device,
    start: LinearHead | None = None,
    activations: Activations | None = None,
    checkpoints: Checkpoints | None = None,
    on_epoch: OnEpoch | None = None,
    on_line: OnLine | None = None,
) -> FinetuneResult:
    """Train a copy of `backbone` with a head on the training rows, and evaluate it once on the reported ones.

    The head is new, or `start`, with the lower rates of a trained one. The same seed gives the same bits on the same
    machine's CPU, whatever `options.workers`, and wherever it was stopped and resumed. `backbone` stays as it was;
    `spec` goes into the head. An unreadable image is listed in the result's `bad`; from the epoch that met it on it is
    left out, and the run goes on. `on_line` is told what it computes in and where it goes on. Raises DataError where
    nothing can train, UsageError for a stage that the backbone does not have, a head that does not fit, checkpoints of
    another run, and rates at which the loss stops being a number.
    """
    stopwatch = Stopwatch()
    forget_peak_memory(device)
    options = replace(options, has_head=start is not None)
    compute = training_compute(options.compute, device)
    groups = describe_groups(backbone, options, n_classes=len(manifest.class_names))
    rows = divide_rows(manifest, select=options.select, seed=options.seed)
    network = network_with_head(backbone, len(manifest.class_names), seed=options.seed)
    if start is not None:
        start = match_head(start, spec=spec, class_names=manifest.class_names)
        put_head(network, backbone, start)
    if checkpoints is not None:
        identity = identify_run(manifest, backbone, options, device=device, start=start, activations=activations)
        checkpoints.identity = {**checkpoints.identity, **identity}
    if on_line is not None:
        on_line(describe_compute(compute, device))
    build = partial(build_trainer, network, backbone, groups, options=options, compute=compute, device=device)
    reader: Reader
    if activations is None:
        trainer = build(prepare=partial(normalise, preprocessing=backbone.preprocessing))
        reader = ImageReader(manifest, backbone.preprocessing, options, stopwatch)
    else:
        trainer = build(prepare=activations.prepare, take_part=partial(part_behind, backbone, activations.stage))
        reader = ActivationReader(activations, options, stopwatch)
    run = Run(manifest, rows, reader, trainer, stopwatch)
    with full_float32():
        with _seeded(device, derive_seed(options.seed, "dropout")):
            epochs, chosen_epoch = train(run, checkpoints=checkpoints, on_epoch=on_epoch, on_line=on_line)
        reported_rows, logits = evaluate(run, rows.reported, desc="evaluate")
        canary_logits = _canary_logits(trainer, backbone)
    kept = trainer.kept.to("cpu").to(memory_format=torch.contiguous_format)
    return FinetuneResult(
        network=kept,
        head=_linear_head(
            run,
            backbone,
            groups=groups,
            spec=spec,
            chosen_epoch=chosen_epoch,
            start=start,
            cached=None if activations is None else activations.describe(),
        ),
        backbone_tensors=_trunk_tensors(kept, backbone.head_path),
        groups=groups,
        compute=compute,
        epochs=epochs,
        chosen_epoch=chosen_epoch,
        n_train_per_class=_count_trained(run),
        reported_rows=reported_rows,
        probabilities=torch.softmax(logits, dim=1).numpy(),
        bad=tuple((manifest.paths[row], reader.bad[row]) for row in sorted(reader.bad)),
        passes=trainer.passes,
        seconds=run.seconds(),
        canary_logits=canary_logits.numpy(),
    )


def identify_run(
    manifest: Manifest,
    backbone: Backbone,
    options: FinetuneOptions,
    *,
    device: torch.device,
    start: LinearHead | None,
    activations: Activations | None,
) -> dict[str, Any]:
    """Return all that a run's end depends on, by the names that a message uses, in values of JSON."""
    rows = hashlib.sha256(json.dumps(manifest.class_names).encode())
    for array in (manifest.digests, manifest.labels, manifest.split, manifest.component()):
        rows.update(np.ascontiguousarray(array).tobytes())
    # The number of threads changes no bit.
    named = {f"--{name_flag(name)}": value for name, value in asdict(options).items() if name != "workers"}
    return {
        **named,
        "format": _CHECKPOINT_FORMAT,
        "--compute": training_compute(options.compute, device),
        "--device": device.type,
        "--backbone": backbone.name,
        "weights of the backbone": backbone.weights_digest,
        "images, labels or split": rows.hexdigest(),
        "--init-head": None if start is None else head_digest(start),
        "cached activations": None if activations is None else activations.describe(),
    }


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


def _canary_logits(trainer: Trainer, backbone: Backbone) -> torch.Tensor:
    """Return the logits of the whole kept network on the canaries, float32 [4, C] on the CPU."""
    pixels = torch.from_numpy(canary_pixels(backbone.preprocessing.crop)).to(trainer.device)
    with torch.inference_mode(), memory_errors(trainer.device):
        logits: torch.Tensor = trainer.kept.eval()(normalise(pixels, backbone.preprocessing))
        return logits.cpu()


def _count_trained(run: Run) -> npt.NDArray[np.int64]:
    """Return int64 [C]: the training images of each class that could be read."""
    labels = run.manifest.labels[run.reader.readable(run.rows.train)]
    return np.bincount(labels, minlength=len(run.manifest.class_names))


def _linear_head(
    run: Run,
    backbone: Backbone,
    *,
    groups: tuple[ParameterGroup, ...],
    spec: ExtractSpec,
    chosen_epoch: int,
    start: LinearHead | None,
    cached: str | None,
) -> LinearHead:
    options = asdict(run.trainer.options)
    select = options["select"]
    for name in (
        "lr_backbone",
        "lr_head",
        "weight_decay",
        "unfreeze",
        "workers",
        "has_head",
    ):  # said by groups and start
        del options[name]
    linear = run.trainer.kept.get_submodule(backbone.head_path)
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
            "by": "fixed schedule" if select is None else f"log loss on {select:g} of the training rows",
            **options,
            "compute": run.trainer.compute,
            "start": "new head" if start is None else start.solver,
            "cached": cached,
            "groups": [{**asdict(group), "stages": list(group.stages)} for group in groups],
        },
    )


def _trunk_tensors(network: nn.Module, head_path: str) -> dict[str, npt.NDArray[Any]]:
    return {
        name: tensor.numpy() for name, tensor in network.state_dict().items() if not name.startswith(f"{head_path}.")
    }
