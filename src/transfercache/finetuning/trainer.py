"""One network on one device: steps of SGD in train mode, logits in eval mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from transfercache import config
from transfercache.backbones.devices import memory_errors, synchronize
from transfercache.backbones.engines import normalise
from transfercache.backbones.registry import Backbone
from transfercache.finetuning.batches import Batch
from transfercache.finetuning.groups import ParameterGroup, freeze_stages, optimizer_groups, set_training_modes
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.schedule import rate_factor
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochTotals:
    """What an epoch's steps saw, on the augmented images and while the network changed."""

    loss: float  # mean cross-entropy, nats
    accuracy: float
    n_rows: int


@dataclass
class Trainer:
    """The network in training; `passes` counts the images of the data that went through it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    preprocessing: Preprocessing
    options: FinetuneOptions
    device: torch.device
    stopwatch: Stopwatch
    passes: int = 0

    def rates(self, progress: float) -> dict[str, float]:
        """Return each group's learning rate when the share `progress` (0 to 1) of the run is done."""
        factor = rate_factor(self.options.schedule, progress)
        return {group["name"]: group["initial_lr"] * factor for group in self.optimizer.param_groups}

    def train_epoch(self, batches: Iterable[Batch], labels: Int64Array, *, epoch: int, n_rows: int) -> EpochTotals:
        """Take one step per batch. `labels` int64 [N] are those of all manifest rows.

        The rates change with every step, by the share of the `n_rows` expected images that came before it.
        """
        set_training_modes(self.network, batch_norm=self.options.batch_norm)
        n_trained = 0
        sums: list[torch.Tensor] = []
        for batch in batches:
            with self.stopwatch.stage("step"), memory_errors(self.device):
                self._set_rates((epoch - 1 + n_trained / n_rows) / self.options.epochs)
                sums.append(self._step(batch.pixels, labels[batch.rows]))
            n_trained += len(batch.rows)
        with self.stopwatch.stage("step"):
            synchronize(self.device)
        self.passes += n_trained
        if not n_trained:
            return EpochTotals(float("nan"), float("nan"), 0)
        loss, correct = torch.stack(sums).cpu().double().sum(dim=0).tolist()
        return EpochTotals(loss / n_trained, correct / n_trained, n_trained)

    def forward_logits(self, pixels: UInt8Array) -> torch.Tensor:
        """Return the logits of uint8 [B, crop, crop, 3] in eval mode, float64 [B, C] on the CPU."""
        self.network.eval()
        with torch.inference_mode(), memory_errors(self.device):
            logits: torch.Tensor = self.network(self._to_device(pixels))
            return logits.cpu().double()

    def _set_rates(self, progress: float) -> None:
        rates = self.rates(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _step(self, pixels: UInt8Array, labels: Int64Array) -> torch.Tensor:
        """Return the summed loss and the number correct, float32 [2].

        They stay on the device: to read a number would make it wait at every step.
        """
        target = torch.from_numpy(labels).to(self.device)
        self.optimizer.zero_grad()
        logits = self.network(self._to_device(pixels))
        loss = cross_entropy(logits, target)
        loss.backward()
        self.optimizer.step()
        n_correct = (logits.detach().argmax(dim=1) == target).sum()
        return torch.stack([loss.detach() * len(target), n_correct.to(loss.dtype)])

    def _to_device(self, pixels: UInt8Array) -> torch.Tensor:
        # A quarter of the bytes travel: the pixels become float32 on the device.
        return normalise(torch.from_numpy(pixels).to(self.device), self.preprocessing)


def build_trainer(
    network: nn.Module,
    backbone: Backbone,
    groups: tuple[ParameterGroup, ...],
    *,
    options: FinetuneOptions,
    device: torch.device,
    stopwatch: Stopwatch,
) -> Trainer:
    """Freeze what no group trains and set up SGD with momentum over the groups; `network` is changed in place."""
    freeze_stages(network, backbone, {stage for group in groups for stage in group.stages})
    network.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(optimizer_groups(network, backbone, groups), momentum=config.MOMENTUM)
    return Trainer(network, optimizer, backbone.preprocessing, options, device, stopwatch)
