"""One network on one device: steps of an optimiser in train mode, logits in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfercache import config
from transfercache.arrays import Int64Array
from transfercache.backbones.devices import memory_errors
from transfercache.backbones.engines import autocast
from transfercache.backbones.registry import Backbone
from transfercache.finetuning.batches import Batch
from transfercache.finetuning.folding import fold_norms
from transfercache.finetuning.groups import ParameterGroup, freeze_stages, optimizer_groups, set_training_modes
from transfercache.finetuning.options import FinetuneOptions
from transfercache.randomness import derive_rng

#: From a network to what of it the inputs go through; its modules are the network's own.
TakePart = Callable[[nn.Module], nn.Module]
#: From a batch's inputs on the device, as the reader gave them, to what the network takes: float32 [B, ...].
Prepare = Callable[[torch.Tensor], torch.Tensor]

# Where the warm-up begins: from nothing, the first step of a short run would be wasted.
_WARMUP_FROM = 0.1


@dataclass
class Trainer:
    """The network in training; its `part` takes whatever `prepare` makes of a batch's inputs and gives logits [B, C].

    `passes` counts the inputs that went through it, forward.
    """

    network: nn.Module
    part: nn.Module  # the network itself, or what is left of it behind cached activations
    kept_part: nn.Module  # the same of `kept`
    averaged: AveragedModel | None  # by --ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16, whose gradients would vanish
    prepare: Prepare
    options: FinetuneOptions
    compute: str  # fp32, bf16 or fp16
    device: torch.device
    passes: int = 0

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and kept: the averaged one where there is one."""
        if self.averaged is None:
            return self.network
        network: nn.Module = self.averaged.module
        return network

    def rates(self, progress: float) -> dict[str, float]:
        """Return each group's learning rate when the share `progress` (0 to 1) of the run is done."""
        factor = rate_factor(self.options.schedule, progress, warmup=self.options.warmup)
        return {group["name"]: group["initial_lr"] * factor for group in self.optimizer.param_groups}

    def set_training(self) -> None:
        """Put what trains in train mode, as it has to be before the first step and after an evaluation."""
        set_training_modes(self.network, batch_norm=self.options.batch_norm)

    def step(self, batch: Batch, labels: Int64Array, *, epoch: int, progress: float) -> torch.Tensor:
        """Take one step on a batch with `labels` int64 [B], and return its summed loss and number correct, float32 [2].

        They stay on the device: to read a number would make it wait at every step. With mixup, correct is the label
        that weighs more.
        """
        rates = self.rates(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        with memory_errors(self.device):
            return self._step(batch, torch.from_numpy(labels).to(self.device), epoch=epoch)

    def _step(self, batch: Batch, target: torch.Tensor, *, epoch: int) -> torch.Tensor:
        inputs, smoothing = self._prepared(batch.inputs), self.options.label_smoothing
        self.optimizer.zero_grad()
        if self.options.mixup:
            rng = derive_rng(self.options.seed, "mixup", epoch, int(batch.rows[0]))
            share = rng.beta(self.options.mixup, self.options.mixup)
            logits = self._forward(_mixed(inputs, share))
            loss = cross_entropy(
                logits, _mixed(one_hot(target, logits.shape[1]).float(), share), label_smoothing=smoothing
            )
            target = target if share >= 0.5 else target.roll(1)
        else:
            logits = self._forward(inputs)
            loss = cross_entropy(logits, target, label_smoothing=smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self.passes += len(batch.rows)
        n_correct = (logits.detach().argmax(dim=1) == target).sum()
        return torch.stack([loss.detach() * len(target), n_correct.to(loss.dtype)])

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with autocast(self.compute, self.device):
            logits: torch.Tensor = self.part(inputs)
        return logits.float()

    def forward_logits(self, inputs: npt.NDArray[np.generic], *, compute: str = "fp32") -> torch.Tensor:
        """Return the logits of the kept network in eval mode, float64 [B, C] on the CPU."""
        self.kept.eval()
        with torch.inference_mode(), memory_errors(self.device), autocast(compute, self.device):
            logits: torch.Tensor = self.kept_part(self._prepared(inputs))
            return logits.cpu().double()

    def _prepared(self, inputs: npt.NDArray[np.generic]) -> torch.Tensor:
        # A quarter of the bytes travel: pixels become float32 on the device.
        return self.prepare(torch.from_numpy(inputs).to(self.device))


def _mixed(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return each of a batch mixed with the one before it, as torchvision's MixUp does (Zhang et al. 2018)."""
    return values * share + values.roll(1, dims=0) * (1.0 - share)


def build_trainer(
    network: nn.Module,
    backbone: Backbone,
    groups: tuple[ParameterGroup, ...],
    *,
    prepare: Prepare,
    options: FinetuneOptions,
    compute: str,
    device: torch.device,
    take_part: TakePart = lambda network: network,
) -> Trainer:
    """Freeze what no group trains and set up the optimiser over the groups; `network` is changed in place."""
    freeze_stages(network, backbone, {stage for group in groups for stage in group.stages})
    network.to(device).to(memory_format=torch.channels_last)
    averaged = None
    if options.ema is not None:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
    part = take_part(network)
    if options.batch_norm == "frozen":
        fold_norms(network, backbone.preprocessing.crop)  # after the copy and the cut: only what trains has to know
    return Trainer(
        network=network,
        part=part,
        kept_part=part if averaged is None else take_part(averaged.module),
        averaged=averaged,
        optimizer=_build_optimizer(options, optimizer_groups(network, backbone, groups)),
        scaler=torch.amp.GradScaler(device.type, enabled=compute == "fp16"),
        prepare=prepare,
        options=options,
        compute=compute,
        device=device,
    )


def _build_optimizer(options: FinetuneOptions, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=config.MOMENTUM)


def rate_factor(schedule: str, progress: float, *, warmup: float) -> float:
    """Return what the highest rate is multiplied by when the share `progress` (0 to 1) of the run is done.

    In the share `warmup` of the run it rises linearly (Goyal et al. 2017, section 2.2). After that, cosine: half a
    period from 1 to 0 without restarts (Loshchilov and Hutter 2017, section 3).
    """
    if progress < warmup:
        return _WARMUP_FROM + (1.0 - _WARMUP_FROM) * progress / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
