from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.errors import UsageError
from transfercache.finetuning.groups import (
    ParameterGroup,
    describe_groups,
    freeze_stages,
    optimizer_groups,
    set_training_modes,
)
from transfercache.finetuning.options import FinetuneOptions

RESNET18_LAYER4 = 8_393_728  # parameters, by hand from the architecture: 3 x 3 and 1 x 1 kernels, norms


RESNET18_STAGES = {"layer1": 157_504, "layer2": 525_568, "layer3": 2_099_712, "layer4": RESNET18_LAYER4}


def test_describe_groups__all(resnet18: Backbone) -> None:
    assert describe_groups(resnet18, FinetuneOptions(batch_size=4), n_classes=2) == (
        *(ParameterGroup(name, (name,), 1e-4, 0.0, n) for name, n in RESNET18_STAGES.items()),
        ParameterGroup("head", ("head",), 1e-3, 0.0, 513 * 2),
    )


def test_describe_groups__a_lower_rate_for_each_stage_towards_the_stem(resnet18: Backbone) -> None:
    options = FinetuneOptions(unfreeze="layer2, layer3", lr_decay=0.5, lr_backbone=0.8, optimizer="adamw")
    groups = describe_groups(resnet18, options, n_classes=3)
    # From the network's last stage on, whether that trains or not.
    assert [(group.name, group.lr) for group in groups] == [
        ("layer2", pytest.approx(0.2)),
        ("layer3", pytest.approx(0.4)),
        ("head", 4e-3),
    ]
    assert {group.weight_decay for group in groups} == {0.01}


def test_describe_groups__named_stages_in_the_networks_order(resnet18: Backbone) -> None:
    groups = describe_groups(resnet18, FinetuneOptions(unfreeze="layer4, layer3"), n_classes=3)
    assert [(group.name, group.stages) for group in groups] == [
        ("layer3", ("layer3",)),
        ("layer4", ("layer4",)),
        ("head", ("head",)),
    ]
    (alone, _) = describe_groups(resnet18, FinetuneOptions(unfreeze="layer4"), n_classes=3)
    assert alone.parameters == RESNET18_LAYER4


def test_describe_groups__none_leaves_the_head(resnet18: Backbone) -> None:
    options = FinetuneOptions(unfreeze="none", lr_head=0.5, weight_decay=0.1)
    assert describe_groups(resnet18, options, n_classes=2) == (ParameterGroup("head", ("head",), 0.5, 0.1, 1026),)


@pytest.mark.parametrize("unfreeze", ["layer5", "layer4,layer5", "Layer4"])
def test_describe_groups__unknown_stage(resnet18: Backbone, unfreeze: str) -> None:
    message = (
        r"resnet18 has no stage '[Ll]ayer[45]' \(did you mean layer.*\?\); give all, none, or some of layer1,layer2"
    )
    with pytest.raises(UsageError, match=message):
        describe_groups(resnet18, FinetuneOptions(unfreeze=unfreeze), n_classes=2)


def test_optimizer_groups__hold_every_unfrozen_parameter_once(resnet18: Backbone) -> None:
    options = FinetuneOptions(unfreeze="layer4", weight_decay=0.1)
    groups = describe_groups(resnet18, options, n_classes=2)
    network = network_with_head(resnet18, 2, seed=0)
    freeze_stages(network, resnet18, ("layer4",))
    built = optimizer_groups(network, resnet18, groups)
    sizes = [(g["name"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in built]
    n_norms = 2 * 5 * 512  # weight and bias of five batch norms
    assert sizes == [
        ("layer4", 0.1, RESNET18_LAYER4 - n_norms),
        ("layer4", 0.0, n_norms),
        ("head", 0.1, 1024),
        ("head", 0.0, 2),
    ]
    given = {id(parameter) for group in built for parameter in group["params"]}
    assert given == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}


def _training(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if module.training}


def test_set_training_modes__frozen_batch_norm(two_stages: Backbone) -> None:
    network = network_with_head(two_stages, 2, seed=0)
    freeze_stages(network, two_stages, ("stage1", "stage2"))
    set_training_modes(network, batch_norm="frozen")
    assert {name for name, _ in network.named_modules()} - _training(network) == {"stage1.norm", "stage2.norm"}


def test_set_training_modes__a_frozen_stage_is_in_eval_mode_with_its_dropout(two_stages: Backbone) -> None:
    network = network_with_head(two_stages, 2, seed=0)
    freeze_stages(network, two_stages, ("stage2",))
    set_training_modes(network, batch_norm="train")
    in_stage2 = {"stage2"} | {
        f"stage2.{name}" for name, _ in two_stages.network.get_submodule("stage2").named_children()
    }
    assert _training(network) == {"", "fc"} | in_stage2


def test_set_training_modes__all_frozen_but_the_head(two_stages: Backbone) -> None:
    network = network_with_head(two_stages, 2, seed=0)
    freeze_stages(network, two_stages, ())
    set_training_modes(network.train(), batch_norm="train")
    assert _training(network) == {"", "fc"}


def test_set_training_modes__batch_norm_without_parameters_follows_the_layer_before_it(two_stages: Backbone) -> None:
    network = nn.Sequential(
        OrderedDict(frozen=nn.Linear(2, 2), norm1=nn.BatchNorm1d(2, affine=False), trained=nn.Linear(2, 2))
    )
    network.add_module("norm2", nn.BatchNorm1d(2, affine=False))
    network.get_submodule("frozen").requires_grad_(False)
    set_training_modes(network, batch_norm="train")
    assert _training(network) == {"", "trained", "norm2"}
