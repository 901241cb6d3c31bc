"""Fine-tuning on images: a fixed schedule over the training rows, then one reading of the reported split."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from transfercache.finetuning.training import OnEpoch, OnLine, Run, diverged, evaluate, ignore, train
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest
from transfercache.randomness import derive_seed
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch
from transfercache.text import name_flag

# Of what a checkpoint holds; one of another number is of another run.
_CHECKPOINT_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Task:
    """What trains, on what and from what: the same for all runs of a search."""

    backbone: Backbone  # stays as it was
    spec: ExtractSpec  # goes into the head
    device: torch.device
    start: LinearHead | None = None  # None: a new head, with the higher rates of one
    activations: Activations | None = None  # None: it trains on the images

    def head_of(self, manifest: Manifest) -> LinearHead | None:
        """Return the head to start from, matched to the data's classes; raises UsageError where it does not fit."""
        return None if self.start is None else match_head(self.start, spec=self.spec, class_names=manifest.class_names)


def finetune(
    manifest: Manifest,
    task: Task,
    *,
    options: FinetuneOptions,
    checkpoints: Checkpoints | None = None,
    on_epoch: OnEpoch = ignore,
    on_line: OnLine = ignore,
) -> FinetuneResult:
    """Train a copy of the task's backbone with a head on the training rows, and evaluate it once on the reported ones.

    The same seed gives the same bits on the same machine's CPU, whatever `options.workers`, and wherever it was stopped
    and resumed. An unreadable image is listed in the result's `bad`; from the epoch that met it on it is left out, and
    the run goes on. `on_line` is told what it computes in and where it goes on. Raises DataError where nothing can
    train, UsageError for a stage that the backbone does not have, a head that does not fit, checkpoints of another run,
    and rates at which the loss stops being a number.
    """
    backbone, device, activations, start = task.backbone, task.device, task.activations, task.head_of(manifest)
    stopwatch = Stopwatch()
    forget_peak_memory(device)
    options = replace(options, has_head=start is not None)
    compute = training_compute(options.compute, device)
    groups = describe_groups(backbone, options, n_classes=len(manifest.class_names))
    rows = divide_rows(manifest, select=options.select, seed=options.seed)
    network = network_with_head(backbone, len(manifest.class_names), seed=options.seed)
    if start is not None:
        put_head(network, backbone, start)
    if checkpoints is not None:
        checkpoints.identity = {**checkpoints.identity, **identify_run(manifest, task, options)}
    on_line(describe_compute(compute, device))
    build = partial(build_trainer, network, backbone, groups, options=options, compute=compute, device=device)
    reader: Reader
    if activations is None:
        trainer = build(prepare=partial(normalise, preprocessing=backbone.preprocessing))
        reader = ImageReader(options, stopwatch, manifest, backbone.preprocessing)
    else:
        trainer = build(prepare=activations.prepare, take_part=partial(part_behind, backbone, activations.stage))
        reader = ActivationReader(options, stopwatch, activations)
    run = Run(manifest, rows, reader, trainer, stopwatch)
    with full_float32():
        with seeded(derive_seed(options.seed, "dropout"), device):
            epochs, chosen_epoch = train(run, checkpoints=checkpoints, on_epoch=on_epoch, on_line=on_line)
        reported_rows, logits = evaluate(run, rows.reported, desc="evaluate")
        canary_logits = _canary_logits(trainer, backbone)
    kept = trainer.kept.to("cpu").to(memory_format=torch.contiguous_format)
    # The loss of a step is that before it: what the last one did has not been seen by then.
    if not all(torch.isfinite(values).all() for values in (logits, canary_logits, *kept.parameters())):
        raise diverged(run, chosen_epoch, "the network after it gives no finite numbers")
    return FinetuneResult(
        network=kept,
        head=_linear_head(run, task, groups=groups, chosen_epoch=chosen_epoch),
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


def identify_run(manifest: Manifest, task: Task, options: FinetuneOptions) -> dict[str, Any]:
    """Return all that a run's end depends on, by the names that a message uses, in values of JSON."""
    # The number of threads changes no bit.
    named = {f"--{name_flag(name)}": value for name, value in asdict(options).items() if name != "workers"}
    backbone, device, activations, start = task.backbone, task.device, task.activations, task.head_of(manifest)
    return {
        **named,
        "format": _CHECKPOINT_FORMAT,
        "--compute": training_compute(options.compute, device),
        "--device": device.type,
        "--backbone": backbone.name,
        "weights of the backbone": backbone.weights_digest,
        "images, labels or split": manifest.rows_digest(),
        "--init-head": None if start is None else head_digest(start),
        "cached activations": None if activations is None else activations.describe(),
    }


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


def _linear_head(run: Run, task: Task, *, groups: tuple[ParameterGroup, ...], chosen_epoch: int) -> LinearHead:
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
    linear = run.trainer.kept.get_submodule(task.backbone.head_path)
    tensors = {name: tensor.detach().numpy().copy() for name, tensor in linear.named_parameters()}
    return LinearHead(
        weight=tensors["weight"],
        bias=tensors["bias"],
        class_names=run.manifest.class_names,
        spec=task.spec,
        solver="finetune",
        n_train=int(_count_trained(run).sum()),
        chosen={
            "epoch": chosen_epoch,
            "by": "fixed schedule" if select is None else f"log loss on {select:g} of the training rows",
            **options,
            "compute": run.trainer.compute,
            "start": "new head" if task.start is None else task.start.solver,
            "cached": None if task.activations is None else task.activations.describe(),
            "groups": [{**asdict(group), "stages": list(group.stages)} for group in groups],
        },
    )


def _trunk_tensors(network: nn.Module, head_path: str) -> dict[str, npt.NDArray[Any]]:
    return {
        name: tensor.numpy() for name, tensor in network.state_dict().items() if not name.startswith(f"{head_path}.")
    }
