from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import regnet

from transfercache.backbones.registry import Backbone, known_backbones, network_with_head
from transfercache.backbones.stages import Stage, parameter_stage, stages_of
from transfercache.backbones.torchvision_adapter import torchvision_architecture


@pytest.fixture(scope="module")
def regnet_on_meta() -> None:
    """RegNet computes its widths with tensors, which must have values even where the parameters have none."""
    original = regnet.BlockParams.from_init_params.__func__

    def computed_on_cpu(cls: type, **parameters: object) -> object:
        with torch.device("cpu"):
            return original(cls, **parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regnet.BlockParams, "from_init_params", classmethod(computed_on_cpu))
        yield


NAMES = [name for name in known_backbones() if name != "efficientnet_lite0"]


@pytest.mark.usefixtures("regnet_on_meta")
@pytest.mark.parametrize("name", NAMES)
def test_stages__end_at_modules_that_run_in_that_order(name: str) -> None:
    architecture = torchvision_architecture(name)
    with torch.device("meta"):
        network = architecture.build().eval()
        image = torch.zeros(1, 3, architecture.preprocessing.crop, architecture.preprocessing.crop)
    stages = stages_of(name)
    defined = {path: order for order, (path, _) in enumerate(network.named_modules())}
    orders = [defined[stage.ends_at] for stage in stages]
    assert orders == sorted(orders)

    ran: list[str] = []
    for stage in stages:
        network.get_submodule(stage.ends_at).register_forward_hook(
            lambda module, inputs, output, stage=stage: ran.append(stage.name)
        )
    with torch.inference_mode():
        network(image)
    assert ran == [stage.name for stage in stages]

    owners = parameter_stage(network, stages, head_path="")
    assert list(owners) == [key for key, _ in network.named_parameters()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("wide_resnet50_2", ["layer1", "layer2", "layer3", "layer4"]),
        ("resnext101_64x4d", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg16_bn", ["stage1", "stage2", "stage3", "stage4", "stage5"]),
        ("vit_l_16", ["stage1", "stage2", "stage3", "stage4"]),
        ("efficientnet_lite0", ["stage1", "stage2", "stage3", "stage4", "stage5"]),
    ],
)
def test_stages_of__names(name: str, expected: list[str]) -> None:
    assert [stage.name for stage in stages_of(name)] == expected


def test_stages_of__an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="lenet: no stages on record"):
        stages_of("lenet")


def test_parameter_stage__of_resnet18(resnet18: Backbone) -> None:
    network = network_with_head(resnet18, 2, seed=0)
    owners = parameter_stage(network, resnet18.stages, resnet18.head_path)
    assert list(owners) == [key for key, _ in network.named_parameters()]
    assert owners["conv1.weight"] == owners["bn1.bias"] == owners["layer1.1.bn2.weight"] == "layer1"
    assert owners["layer2.0.downsample.0.weight"] == "layer2"
    assert owners["layer4.1.conv2.weight"] == "layer4"
    assert owners["fc.weight"] == owners["fc.bias"] == "head"


def test_parameter_stage__gives_the_rest_to_the_last_stage_and_stems_to_the_first() -> None:
    network = nn.Sequential()
    for name, layer in [("stem", 1), ("a", 2), ("gap", 3), ("b", 4), ("norm", 5), ("fc", 6)]:
        network.add_module(name, nn.Linear(layer, 1, bias=False))
    owners = parameter_stage(network, [Stage("stage1", "a"), Stage("stage2", "b")], "fc")
    assert list(owners.values()) == ["stage1", "stage1", "stage2", "stage2", "stage2", "head"]


def test_parameter_stage__one_stage_for_the_whole_network() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    owners = parameter_stage(network, [Stage("stage1", "")], "1")
    assert owners == {"0.weight": "stage1", "0.bias": "stage1", "1.weight": "head", "1.bias": "head"}
