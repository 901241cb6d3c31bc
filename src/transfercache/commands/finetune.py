"""`tlc finetune`: train the backbone itself on the images, with a rate per parameter group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfercache import config
from transfercache.backbones.choice import choose_engine
from transfercache.backbones.devices import pick_device
from transfercache.backbones.registry import load_backbone
from transfercache.commands.boundary import cache_activations
from transfercache.commands.inputs import (
    BadImage,
    EmbedOptions,
    cache_root,
    changed_words,
    finish_manifest,
    log_bad,
)
from transfercache.errors import UsageError
from transfercache.files import check_writable
from transfercache.finetuning.activations import boundary_before
from transfercache.finetuning.checkpoints import SUFFIX, Checkpoints
from transfercache.finetuning.groups import ParameterGroup
from transfercache.finetuning.loop import finetune as train
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import EpochRecord, FinetuneResult
from transfercache.heads.linear_head import LinearHead
from transfercache.images.manifest import Manifest, check_trainable
from transfercache.images.sources import read_source
from transfercache.metrics import Report, evaluate
from transfercache.models.card import CardData, save_card
from transfercache.models.head_file import Model, load_model, save_model
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
    compute: str  # that of training; the figures are fp32's
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    n_train: int
    straddling: int  # groups, or sets of equal images, that the given split divides
    reported: Report | None
    seconds: dict[str, float]
    backbone_passes: int
    bad: tuple[BadImage, ...]
    data: str
    extraction: dict[str, Any] | None = None  # with `cached`: the cache, what making its rows took, and by which runs

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        return ("tlc", "predict", str(self.model), self.data)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc finetune`."""
        return {
            "model": str(self.model),
            "groups": [asdict(group) for group in self.groups],
            "compute": self.compute,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "chosen_epoch": self.chosen_epoch,
            "n_train": self.n_train,
            "straddling": self.straddling,
            "reported": None if self.reported is None else self.reported.to_json(),
            "seconds": self.seconds,
            "backbone_passes": self.backbone_passes,
            "bad": [item.to_json() for item in self.bad],
            "extraction": self.extraction,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.classes import render_report

        footer = "\n".join((str(self.model), *map(describe_group, self.groups), self._cost()))
        return render_report(self.reported, title=f"fine-tuned on {self.n_train} training rows", footer=footer)

    def _cost(self) -> str:
        last = self.epochs[-1]
        return (
            f"epoch {self.chosen_epoch} of {len(self.epochs)} in {self.compute}, {self.seconds['total']:.1f} s "
            f"({last.seconds:.1f} s an epoch, {last.images_per_second:.1f} images/s), {self.backbone_passes:,} passes, "
            f"at most {last.peak_memory_bytes / 2**30:.1f} GiB of memory{self._extraction_cost()}"
        )

    def _extraction_cost(self) -> str:
        if self.extraction is None:
            return ""
        seconds, passes, cache = (self.extraction[name] for name in ("seconds", "images", "cache"))
        return f"\nthe activations before them took {seconds:.1f} s and {passes:,} passes, in {cache}"


def describe_group(group: ParameterGroup) -> str:
    """Return one line for a person."""
    return f"{group.name}: {group.parameters:,} parameters, lr {group.lr:.3g}, weight decay {group.weight_decay:g}"


def finetune(
    data: str | Path,
    *,
    backbone: str = config.BACKBONE,
    weights: str = config.WEIGHTS,
    init_head: Path | str | None = None,
    unfreeze: str = config.UNFREEZE,
    cached: bool = False,
    views: int | None = None,
    storage_dtype: config.StorageDtype = config.STORAGE_DTYPE,
    max_bytes: str | int | None = None,
    optimizer: config.FinetuneOptimizer = config.FINETUNE_OPTIMIZER,
    lr_backbone: float | None = None,
    lr_head: float | None = None,
    lr_decay: float = config.LR_DECAY,
    weight_decay: float | None = None,
    schedule: config.Schedule = config.SCHEDULE,
    warmup: float = config.WARMUP,
    epochs: int = config.EPOCHS,
    batch_size: int = config.FINETUNE_BATCH_SIZE,
    batch_norm: config.BatchNorm = config.BATCH_NORM,
    augment: config.Augment = config.AUGMENT,
    crop_area: float = config.CROP_AREA,
    mixup: float = config.MIXUP,
    label_smoothing: float = config.LABEL_SMOOTHING,
    ema: str | float = config.EMA,
    select: str | float = config.SELECT,
    patience: int | None = None,
    compute: config.Compute = config.COMPUTE,
    device: config.Device = config.DEVICE,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    labels: Path | str | None = None,
    val_fraction: float = config.VAL_FRACTION,
    split_seed: int = config.SPLIT_SEED,
    on_bad: config.OnBad = config.ON_BAD,
    seed: int = config.SEED,
    out: Path | str | None = None,
    resume: bool = False,
    keep_checkpoints: int = config.KEEP_CHECKPOINTS,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> FinetuneOutcome:
    """Fine-tune a backbone on the training rows of DATA, and report it once, on its test split, else val.

    `init_head` is a MODEL of `train_head` whose head is the start, in place of a new one. `unfreeze` is all, none, or
    stage names joined by commas. A rate or a weight decay that is None is the optimiser's: for SGD the tutorial's (1e-4
    for the backbone, 1e-3 for the head, at batches of 4), scaled linearly with `batch_size`; with `init_head` both are
    a quarter of the backbone's. The schedule is fixed and the last epoch is kept, unless `select` holds out that share
    of the training rows to choose the epoch on. Training is in bfloat16 where the hardware has units for it
    (`compute`), every figure on the reported split in float32.

    With `cached` the stages that train start from activations at the end of the one before them: of each image its
    `views` (see `extract_features`), of which every epoch draws one, in place of `augment`. They are taken from the
    cache under `cache_dir`, or made first, in float32, within `max_bytes`. The reported figures are of cached
    activations too, in `storage_dtype`; the MODEL is a whole network as ever.

    Checkpoints are in a folder beside `out` until the MODEL is written; those of an unfinished run are refused unless
    `resume` is set, and then the run goes on to the same MODEL. `on_epoch` is called after each epoch, `on_line` with a
    line on what it computes in and where it goes on.

    Raises DataError, UsageError, WeightsError, ResourceError.
    """
    if cached:
        augment = _without_images(augment, crop_area)
    else:
        _check_unused(views=(views, None), storage_dtype=(storage_dtype, "auto"), max_bytes=(max_bytes, None))
    options = FinetuneOptions(
        epochs=epochs,
        batch_size=batch_size,
        unfreeze=unfreeze,
        optimizer=optimizer,
        lr_backbone=lr_backbone,
        lr_head=lr_head,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        label_smoothing=label_smoothing,
        mixup=mixup,
        augment=augment,
        crop_area=crop_area,
        ema=parse_share("ema", ema),
        compute=compute,
        batch_norm=batch_norm,
        select=parse_share("select", select),
        patience=patience,
        seed=seed,
        workers=workers,
    )
    if keep_checkpoints < 1:
        raise UsageError(f"--keep-checkpoints {keep_checkpoints}: must be at least 1")
    start = None if init_head is None else _read_head(Path(init_head))
    scanned_ns, watch = time.time_ns(), Stopwatch()
    manifest = finish_manifest(
        read_source(data),
        watch=watch,
        known={},
        scanned_ns=scanned_ns,
        labels=labels,
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    for warning in check_trainable(manifest):
        logger.warning("%s", warning)
    loaded = load_backbone(backbone, weights=weights)
    stage = boundary_before(loaded, options) if cached else None
    path = Path(out) if out is not None else Path(config.MODELS_DIR) / f"{manifest.name}-finetune.safetensors"
    check_writable(path)  # hours of training must not end in a file that cannot be written
    checkpoints = Checkpoints(path.with_name(path.name + SUFFIX), keep=keep_checkpoints, resume=resume)
    extraction = activations = None
    with checkpoints.held():
        if stage is not None:
            extraction, activations = cache_activations(
                manifest,
                loaded,
                stage,
                cache_dir=cache_root(cache_dir),
                options=EmbedOptions(storage_dtype=storage_dtype, views=views, workers=workers, max_bytes=max_bytes),
                choice=choose_engine(device=device),
                hash_seconds=watch.seconds()["hash"],
                on_line=on_line,
            )
        result = train(
            manifest,
            loaded,
            options=options,
            spec=EmbedOptions().spec(loaded),
            device=pick_device(device),
            start=start,
            activations=activations,
            checkpoints=checkpoints,
            on_epoch=on_epoch,
            on_line=on_line,
        )
        reported = report_finetuned(manifest, result)
        model = Model(
            head=result.head,
            canary_logits=result.canary_logits,
            weights_source=loaded.weights_source,
            reported=None if reported is None else reported.to_json(),
            backbone_tensors=result.backbone_tensors,
        )
        save_model(model, path)
        curve = [asdict(epoch) for epoch in result.epochs]
        save_card(path, model, _card_data(manifest, result), seconds=result.seconds["total"], epochs=curve)
        checkpoints.remove()
    bad = tuple(BadImage(path, reason) for path, reason in result.bad)
    log_bad(bad, manifest.n_rows, on_bad=on_bad)
    return FinetuneOutcome(
        model=path,
        groups=result.groups,
        compute=result.compute,
        epochs=result.epochs,
        chosen_epoch=result.chosen_epoch,
        n_train=result.n_train,
        straddling=count_straddling(manifest.split, manifest.component()),
        reported=reported,
        seconds=dict(result.seconds),
        backbone_passes=result.passes,
        bad=bad,
        data=str(data),
        extraction=None if extraction is None else {"cache": str(extraction.cache), **extraction.record},
    )


def _without_images(augment: config.Augment, crop_area: float) -> config.Augment:
    """Return what `--augment` is where no image is read: by default none; boundary_before refuses the others."""
    if crop_area != config.CROP_AREA:
        raise UsageError(f"--crop-area {crop_area}: is of images, and with --cached none is read; leave it out")
    return "none" if augment == config.AUGMENT else augment


def _check_unused(**options: tuple[object, object]) -> None:
    given = changed_words(**options)
    if given:
        raise UsageError(f"{' '.join(given)}: is of cached activations; pass --cached as well, or leave it out")


def _card_data(manifest: Manifest, result: FinetuneResult) -> CardData:
    bad = {path for path, _ in result.bad}
    good = manifest.subset(np.array([path not in bad for path in manifest.paths]))
    return CardData(good.name, good.digests, good.labels, good.split)


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


def _read_head(path: Path) -> LinearHead:
    model = load_model(path)
    if model.is_finetuned:
        raise UsageError(f"--init-head {path}: its head fits the backbone in it alone; give a MODEL of train-head")
    return model.head


def parse_share(name: str, value: str | float) -> float | None:
    """Return the number of an option that may also be none; raises UsageError for another word."""
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"--{name} {value!r} must be none, or a number between 0 and 1") from error
