"""Which parameters train, at which rate, and which modules run in train mode."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transfercache.backbones.registry import Backbone
from transfercache.backbones.stages import HEAD, parameter_stage
from transfercache.errors import UsageError, did_you_mean
from transfercache.finetuning.options import FinetuneOptions

BACKBONE = "backbone"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; `lr` is that of the first step, `parameters` counts scalars."""

    name: str
    stages: tuple[str, ...]
    lr: float
    parameters: int


def describe_groups(backbone: Backbone, options: FinetuneOptions, *, n_classes: int) -> tuple[ParameterGroup, ...]:
    """Return the groups that train, backbone before head; no backbone group where every stage is frozen.

    Raises UsageError for a stage that the backbone does not have.
    """
    stages = unfrozen_stages(backbone, options)
    rates = options.learning_rates()
    stage_of = parameter_stage(backbone.network, backbone.stages, backbone.head_path)
    sizes = {name: parameter.numel() for name, parameter in backbone.network.named_parameters()}
    n_backbone = sum(size for name, size in sizes.items() if stage_of[name] in stages)
    head = ParameterGroup(HEAD, (HEAD,), rates[HEAD], (backbone.dim + 1) * n_classes)
    if not stages:
        return (head,)
    return (ParameterGroup(BACKBONE, stages, rates[BACKBONE], n_backbone), head)


def unfrozen_stages(backbone: Backbone, options: FinetuneOptions) -> tuple[str, ...]:
    """Return the stages that train, in the network's order; raises UsageError for an unknown name."""
    known = tuple(stage.name for stage in backbone.stages)
    if options.unfreeze == "none":
        return ()
    if options.unfreeze == "all":
        return known
    asked = [name.strip() for name in options.unfreeze.split(",")]
    for name in asked:
        if name not in known:
            raise UsageError(
                f"--unfreeze {options.unfreeze}: {backbone.name} has no stage {name!r}{did_you_mean(name, known)}; "
                f"give all, none, or some of {','.join(known)}"
            )
    return tuple(name for name in known if name in asked)


def freeze_stages(network: nn.Module, backbone: Backbone, stages: Collection[str]) -> None:
    """Let only the head and the parameters of `stages` take gradients; `network` has a head at `head_path`."""
    stage_of = parameter_stage(network, backbone.stages, backbone.head_path)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(stage_of[name] == HEAD or stage_of[name] in stages)


def optimizer_groups(
    network: nn.Module, backbone: Backbone, groups: Collection[ParameterGroup]
) -> list[dict[str, Any]]:
    """Return torch's parameter groups (params, lr, initial_lr, name) for `groups`, in their order."""
    stage_of = parameter_stage(network, backbone.stages, backbone.head_path)
    return [
        {
            "name": group.name,
            "params": [p for name, p in network.named_parameters() if stage_of[name] in group.stages],
            "lr": group.lr,
            "initial_lr": group.lr,
        }
        for group in groups
    ]


def set_training_modes(network: nn.Module, *, batch_norm: str) -> None:
    """Put what trains in train mode and everything frozen in eval mode, by the parameters' `requires_grad`.

    A frozen stage is a fixed function of the image: its dropout and stochastic depth are off as well as its batch
    norm. Batch norm is in train mode only where it trains and `batch_norm` is train. The root is in train mode.
    """
    for module, is_trained in _modules_trained(network):
        module.training = is_trained and (batch_norm == "train" or not isinstance(module, _BatchNorm))


def _modules_trained(network: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    # A module without parameters (dropout, activation) acts on the output of the last one before it that has some.
    is_trained = False
    for module in network.modules():
        below = [parameter.requires_grad for parameter in module.parameters()]
        if any(True for _ in module.parameters(recurse=False)):
            is_trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        yield module, any(below) if below else is_trained
