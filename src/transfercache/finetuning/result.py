"""What a fine-tuning run leaves: the network, its curve, and its probabilities on the reported rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from transfercache.finetuning.groups import ParameterGroup
from transfercache.heads.linear_head import LinearHead


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 1; the training figures are those of the augmented images as they were trained on."""

    epoch: int
    lr: dict[str, float]  # group name -> rate at the epoch's first step
    train_loss: float  # as it was minimised: with label smoothing and mixup, where they are on
    train_accuracy: float
    seconds: float  # training alone; selection is not in it
    images_per_second: float
    passes: int  # images through the network, forward, since the run began; selection is in it
    peak_memory_bytes: int  # so far: of torch's tensors on an NVIDIA GPU, elsewhere of the process
    n_bad: int  # images that cannot be read, known so far
    selection_loss: float | None  # held-out log loss; None without --select
    selection_accuracy: float | None


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """`probabilities` belong to `reported_rows`; the reported split was read once, after `chosen_epoch` was."""

    network: nn.Module  # eval mode, fp32, on the CPU
    head: LinearHead  # the network's final linear layer
    backbone_tensors: Mapping[str, npt.NDArray[Any]]  # the state_dict without the head; shares the network's memory
    groups: tuple[ParameterGroup, ...]
    compute: str  # that of training: fp32, bf16 or fp16
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    n_train_per_class: npt.NDArray[np.int64]  # int64 [C], images in the last epoch: not the bad and the held-out ones
    reported_rows: npt.NDArray[np.int64]  # int64 [M], manifest rows in order
    probabilities: npt.NDArray[np.float64]  # float64 [M, C]
    bad: tuple[tuple[str, str], ...]  # (path, reason) in the manifest's order
    passes: int  # images through the network, forward: training, selection and evaluation
    seconds: Mapping[str, float]  # decode (summed over workers), step, evaluate (selection included), total
    canary_logits: npt.NDArray[np.float32]  # float32 [4, C]
