"""What a fine-tuning run is asked to do, checked where it is stated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from transfercache import config
from transfercache.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class FinetuneOptions:
    """The settings of one run; raises UsageError naming the setting that is off.

    `unfreeze` is all, none, or stage names joined by commas (checked against the backbone by `describe_groups`).
    A rate or a weight decay that is None is the optimiser's default; rates that are given are used as they are.
    `warmup` is a share of the run, `crop_area` the least share of an image that a crop of it has. `mixup` is the
    parameter of its Beta distribution, 0 for none. `ema` is the decay of the averaged network, which is then the one
    that is evaluated and kept. `has_head` says that the head is trained already (LP-FT). `select` is the share of the
    training rows that is held out to choose the epoch; None keeps the last epoch. With `patience` the run ends after
    so many epochs that were no better there.
    """

    epochs: int = config.EPOCHS
    batch_size: int = config.FINETUNE_BATCH_SIZE
    unfreeze: str = config.UNFREEZE
    optimizer: str = config.FINETUNE_OPTIMIZER
    lr_backbone: float | None = None
    lr_head: float | None = None
    lr_decay: float = config.LR_DECAY
    weight_decay: float | None = None
    schedule: str = config.SCHEDULE
    warmup: float = config.WARMUP
    label_smoothing: float = config.LABEL_SMOOTHING
    mixup: float = config.MIXUP
    augment: str = config.AUGMENT
    crop_area: float = config.CROP_AREA
    ema: float | None = None
    compute: str = config.COMPUTE
    batch_norm: str = config.BATCH_NORM
    has_head: bool = False
    select: float | None = None
    patience: int | None = None
    seed: int = config.SEED
    workers: int | None = None  # that decode; None: see `images.processes.decoding_workers`

    def __post_init__(self) -> None:
        self._check_words()
        self._check_numbers()
        if self.select is not None and not 0 < self.select < 1:
            raise UsageError(f"--select {self.select}: must be none, or a share of the training rows between 0 and 1")
        if self.patience is not None and self.select is None:
            raise UsageError(f"--patience {self.patience}: needs rows to judge by; pass --select as well, such as 0.2")

    def _check_words(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, config.FinetuneOptimizer),
            ("schedule", self.schedule, config.Schedule),
            ("augment", self.augment, config.Augment),
            ("compute", self.compute, config.Compute),
            ("batch-norm", self.batch_norm, config.BatchNorm),
        ):
            choices = get_args(known)
            if value not in choices:
                raise UsageError(f"--{name} {value}: must be {' or '.join(choices)}{did_you_mean(value, choices)}")

    def _check_numbers(self) -> None:
        counts = {"epochs": self.epochs, "batch-size": self.batch_size, "workers": self.workers}
        for name, count in {**counts, "patience": self.patience}.items():
            if count is not None and count < 1:
                raise UsageError(f"--{name} {count}: must be at least 1")
        for name, rate in (("lr-backbone", self.lr_backbone), ("lr-head", self.lr_head)):
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise UsageError(
                    f"--{name} {rate}: must be a positive number; to train the head alone: --unfreeze none"
                )
        if not 0 < self.lr_decay <= 1:
            raise UsageError(
                f"--lr-decay {self.lr_decay}: must lie above 0 and up to 1, where all stages have one rate"
            )
        for name, share in (("warmup", self.warmup), ("label-smoothing", self.label_smoothing)):
            if not 0 <= share < 1:
                raise UsageError(f"--{name} {share}: must be at least 0 and below 1")
        for name, size in (("mixup", self.mixup), ("weight-decay", self.weight_decay)):
            if size is not None and not (math.isfinite(size) and size >= 0):
                raise UsageError(f"--{name} {size}: must be a number that is not negative")
        if not 0 < self.crop_area <= 1:
            raise UsageError(f"--crop-area {self.crop_area}: must lie above 0 and up to 1, the whole image")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"--ema {self.ema}: must be none, or a decay between 0 and 1 such as 0.99")

    def learning_rates(self) -> dict[str, float]:
        """Return the highest rate of the last stage, "backbone", and of the "head"."""
        if self.optimizer == "sgd":
            scale = self.batch_size / config.SEED_BATCH_SIZE
            backbone, head = config.SEED_LR_BACKBONE * scale, config.SEED_LR_HEAD * scale
        else:
            scale = math.sqrt(self.batch_size / config.ADAMW_BATCH_SIZE)
            backbone, head = config.ADAMW_LR_BACKBONE * scale, config.ADAMW_LR_HEAD * scale
        if self.has_head:
            backbone *= config.PROBED_RATE_SHARE
            head = backbone
        return {
            "backbone": backbone if self.lr_backbone is None else self.lr_backbone,
            "head": head if self.lr_head is None else self.lr_head,
        }

    def decay(self) -> float:
        """Return the weight decay: as it is given, else the optimiser's."""
        if self.weight_decay is not None:
            return self.weight_decay
        return config.ADAMW_WEIGHT_DECAY if self.optimizer == "adamw" else 0.0
