"""Which parameters train, at which rate, and which modules run in train mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transfercache.backbones.registry import Backbone
from transfercache.backbones.stages import HEAD, parameter_stage
from transfercache.errors import UsageError, did_you_mean
from transfercache.finetuning.options import FinetuneOptions


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: a stage's, or the head's; `lr` is the highest of the run.

    `parameters` counts scalars. `weight_decay` is that of matrices and kernels; biases and norms have none (He et al.
    2019, "Bag of Tricks", section 3.1).
    """

    name: str
    stages: tuple[str, ...]
    lr: float
    weight_decay: float
    parameters: int


def describe_groups(backbone: Backbone, options: FinetuneOptions, *, n_classes: int) -> tuple[ParameterGroup, ...]:
    """Return the groups that train: the stages in the network's order, then the head.

    The rate of the network's last stage is `lr_backbone`, and each stage before it has `lr_decay` times that of the
    next (Howard and Ruder 2018, section 3.2). Raises UsageError for a stage that the backbone does not have.
    """
    rates, decay = options.learning_rates(), options.decay()
    sizes, names = count_parameters(backbone), [stage.name for stage in backbone.stages]
    groups = []
    for stage in unfrozen_stages(backbone, options):
        steps = len(names) - 1 - names.index(stage)
        groups.append(ParameterGroup(stage, (stage,), rates["backbone"] * options.lr_decay**steps, decay, sizes[stage]))
    return (*groups, ParameterGroup(HEAD, (HEAD,), rates["head"], decay, (backbone.dim + 1) * n_classes))


def describe_effects(backbone: Backbone, options: FinetuneOptions) -> tuple[Any, ...]:
    """Return what tells a run from others on the same rows: the groups, and the options that have a say beside them."""
    groups = describe_groups(backbone, options, n_classes=2)
    said = dict.fromkeys(("unfreeze", "lr_backbone", "lr_head", "lr_decay", "weight_decay"))  # by the groups
    if options.augment == "none":
        said["crop_area"] = None
    if len(groups) == 1 or not any(isinstance(module, _BatchNorm) for module in backbone.network.modules()):
        said["batch_norm"] = None
    return groups, {**asdict(options), **said}


def count_parameters(backbone: Backbone) -> dict[str, int]:
    """Return stage name -> how many scalars it has."""
    stage_of = parameter_stage(backbone.network, backbone.stages, backbone.head_path)
    sizes: Counter[str] = Counter()
    for name, parameter in backbone.network.named_parameters():
        sizes[stage_of[name]] += parameter.numel()
    return sizes


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
    """Return torch's parameter groups (name, params, lr, initial_lr, weight_decay), two of a name for each of `groups`.

    The second holds biases, norms and all else of one dimension, whose weight decay is 0.
    """
    stage_of = parameter_stage(network, backbone.stages, backbone.head_path)
    built = []
    for group in groups:
        own = [p for name, p in network.named_parameters() if stage_of[name] in group.stages]
        wide, narrow = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        rate = {"name": group.name, "lr": group.lr, "initial_lr": group.lr}
        built.append({**rate, "params": wide, "weight_decay": group.weight_decay})
        built.append({**rate, "params": narrow, "weight_decay": 0.0})
    return [group for group in built if group["params"]]


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
