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
    A rate that is None is the seed's, scaled linearly with the batch; one that is given is used as it is. `select` is
    the share of the training rows that is held out to choose the epoch; None keeps the last epoch.
    """

    epochs: int = config.EPOCHS
    batch_size: int = config.FINETUNE_BATCH_SIZE
    unfreeze: str = config.UNFREEZE
    lr_backbone: float | None = None
    lr_head: float | None = None
    schedule: str = config.SCHEDULE
    batch_norm: str = config.BATCH_NORM
    select: float | None = None
    seed: int = config.SEED
    workers: int | None = None  # decoding threads; None: one per core

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, get_args(config.Schedule))
        _check_choice("batch-norm", self.batch_norm, get_args(config.BatchNorm))
        for name, count in (("epochs", self.epochs), ("batch-size", self.batch_size), ("workers", self.workers)):
            if count is not None and count < 1:
                raise UsageError(f"--{name} {count}: must be at least 1")
        for name, rate in (("lr-backbone", self.lr_backbone), ("lr-head", self.lr_head)):
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise UsageError(
                    f"--{name} {rate}: must be a positive number; to train the head alone: --unfreeze none"
                )
        if self.select is not None and not 0 < self.select < 1:
            raise UsageError(f"--select {self.select}: must be none, or a share of the training rows between 0 and 1")

    def learning_rates(self) -> dict[str, float]:
        """Return the rate at the first step for the groups "backbone" and "head"."""
        scale = self.batch_size / config.SEED_BATCH_SIZE
        return {
            "backbone": config.SEED_LR_BACKBONE * scale if self.lr_backbone is None else self.lr_backbone,
            "head": config.SEED_LR_HEAD * scale if self.lr_head is None else self.lr_head,
        }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"--{name} {value}: must be {' or '.join(choices)}{did_you_mean(value, choices)}")
