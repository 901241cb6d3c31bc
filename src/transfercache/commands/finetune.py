"""`tlc finetune`: train the backbone itself on the images, with a rate per parameter group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfercache import config
from transfercache.backbones.devices import pick_device
from transfercache.backbones.registry import load_backbone
from transfercache.commands.inputs import BadImage, EmbedOptions, finish_manifest, log_bad
from transfercache.errors import UsageError
from transfercache.files import check_writable
from transfercache.finetuning.groups import ParameterGroup
from transfercache.finetuning.loop import finetune as train
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import EpochRecord, FinetuneResult
from transfercache.images.manifest import Manifest, check_trainable
from transfercache.images.sources import read_source
from transfercache.metrics import Report, evaluate
from transfercache.models.head_file import Model, save_model
from transfercache.splits import Split, count_straddling
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FinetuneOutcome:
    """A fine-tuned model, where it was written, how it was trained, and its figures on the reported split."""

    model: Path
    groups: tuple[ParameterGroup, ...]
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    n_train: int
    straddling: int  # groups, or sets of equal images, that the given split divides
    reported: Report | None
    seconds: dict[str, float]
    backbone_passes: int
    bad: tuple[BadImage, ...]
    data: str

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        return ("tlc", "predict", str(self.model), self.data)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc finetune`."""
        return {
            "model": str(self.model),
            "groups": [asdict(group) for group in self.groups],
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "chosen_epoch": self.chosen_epoch,
            "n_train": self.n_train,
            "straddling": self.straddling,
            "reported": None if self.reported is None else self.reported.to_json(),
            "seconds": self.seconds,
            "backbone_passes": self.backbone_passes,
            "bad": [item.to_json() for item in self.bad],
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.classes import render_report

        groups = "; ".join(
            f"{group.name}: {', '.join(group.stages)}, {group.parameters:,} parameters, lr {group.lr:g}"
            for group in self.groups
        )
        footer = (
            f"{self.model}\n{groups}\nepoch {self.chosen_epoch} of {len(self.epochs)}, {self.seconds['total']:.1f} s"
        )
        return render_report(self.reported, title=f"fine-tuned on {self.n_train} training rows", footer=footer)


def finetune(
    data: str | Path,
    *,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    device: config.Device = config.DEVICE,
    unfreeze: str = config.UNFREEZE,
    lr_backbone: float | None = None,
    lr_head: float | None = None,
    schedule: config.Schedule = config.SCHEDULE,
    epochs: int = config.EPOCHS,
    batch_size: int = config.FINETUNE_BATCH_SIZE,
    batch_norm: config.BatchNorm = config.BATCH_NORM,
    select: str | float = config.SELECT,
    workers: int | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    on_bad: config.OnBad = config.ON_BAD,
    seed: int = config.SEED,
    out: Path | str | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FinetuneOutcome:
    """Fine-tune a backbone on the training rows of DATA, and report it once, on its test split, else val.

    `unfreeze` is all, none, or stage names joined by commas. A learning rate that is None is the tutorial's (1e-4 for
    the backbone, 1e-3 for the head, at batches of 4), scaled linearly with `batch_size`. The schedule is fixed and the
    last epoch is kept, unless `select` holds out that share of the training rows to choose the epoch on. `on_epoch` is
    called after each epoch.

    Raises DataError, UsageError, WeightsError, ResourceError.
    """
    options = FinetuneOptions(
        epochs=epochs,
        batch_size=batch_size,
        unfreeze=unfreeze,
        lr_backbone=lr_backbone,
        lr_head=lr_head,
        schedule=schedule,
        batch_norm=batch_norm,
        select=_parse_select(select),
        seed=seed,
        workers=workers,
    )
    scanned_ns = time.time_ns()
    manifest = finish_manifest(
        read_source(data),
        watch=Stopwatch(),
        known={},
        scanned_ns=scanned_ns,
        labels=labels,
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    for warning in check_trainable(manifest):
        logger.warning("%s", warning)
    loaded = load_backbone(backbone, weights=weights)
    path = Path(out) if out is not None else Path(config.MODELS_DIR) / f"{manifest.name}-finetune.safetensors"
    check_writable(path)  # hours of training must not end in a file that cannot be written
    result = train(
        manifest,
        loaded,
        options=options,
        spec=EmbedOptions().spec(loaded),
        device=pick_device(device),
        on_epoch=on_epoch,
    )
    reported = report_finetuned(manifest, result)
    save_model(
        Model(
            head=result.head,
            canary_logits=result.canary_logits,
            weights_source=loaded.weights_source,
            reported=None if reported is None else reported.to_json(),
            backbone_tensors=result.backbone_tensors,
        ),
        path,
    )
    bad = tuple(BadImage(path, reason) for path, reason in result.bad)
    log_bad(bad, manifest.n_rows, on_bad=on_bad)
    return FinetuneOutcome(
        model=path,
        groups=result.groups,
        epochs=result.epochs,
        chosen_epoch=result.chosen_epoch,
        n_train=result.n_train,
        straddling=count_straddling(manifest.split, manifest.component()),
        reported=reported,
        seconds=dict(result.seconds),
        backbone_passes=result.passes,
        bad=bad,
        data=str(data),
    )


def report_finetuned(manifest: Manifest, result: FinetuneResult) -> Report | None:
    """Return the figures of a run on the rows that it evaluated; None where the data reports none."""
    rows = result.reported_rows
    if not len(rows):
        return None
    return evaluate(
        manifest.labels[rows],
        result.probabilities,
        class_names=manifest.class_names,
        n_train_per_class=result.n_train_per_class,
        split=Split(manifest.split[rows[0]]).name.lower(),
    )


def _parse_select(value: str | float) -> float | None:
    if value == config.SELECT:
        return None
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"--select {value!r} must be none, or a share of the training rows such as 0.2") from error
