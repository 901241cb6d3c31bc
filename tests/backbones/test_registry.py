from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import normalise
from transfercache.backbones.registry import Backbone, known_backbones, load_backbone, network_with_head
from transfercache.errors import UsageError, WeightsError
from transfercache.spec import Preprocessing


def inputs_of(backbone: Backbone) -> torch.Tensor:
    return normalise(torch.from_numpy(canary_pixels(backbone.preprocessing.crop)[:2]), backbone.preprocessing)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_load_backbone__refuses_squeezenet(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} ends in a convolution, not in one nn.Linear.*choose another"):
        load_backbone(name, weights="random")
    assert name not in known_backbones()


def test_load_backbone__suggests_the_name_that_was_meant() -> None:
    with pytest.raises(UsageError, match=r"unknown backbone 'resnet81' \(did you mean .*resnet18"):
        load_backbone("resnet81")


def test_known_backbones__are_sorted_and_complete() -> None:
    names = known_backbones()
    assert names == sorted(names)
    assert len(names) == len(torchvision.models.list_models(module=torchvision.models)) - 2 + 1
    assert {"resnet18", "efficientnet_lite0", "vit_b_16"} <= set(names)


def test_load_backbone__describes_resnet18(resnet18: Backbone) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert resnet18.preprocessing == Preprocessing(256, 224, "bilinear", mean, std, antialias=True)
    assert (resnet18.head_path, resnet18.dim, resnet18.boundary) == ("fc", 512, "pooled")
    assert resnet18.weights_source == {"kind": "random", "where": "seed 0", "licence": "none needed"}
    assert [stage.name for stage in resnet18.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert resnet18.classifier is not None
    assert resnet18.classifier.out_features == 1000
    assert not any(module.training for module in resnet18.network.modules())


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet50", (232, 224, "bilinear")), ("vit_h_14", (518, 518, "bicubic"))]
)
def test_preprocessing__is_that_of_the_default_weights(name: str, expected: tuple[int, int, str]) -> None:
    from transfercache.backbones.torchvision_adapter import torchvision_architecture

    preprocessing = torchvision_architecture(name).preprocessing
    assert (preprocessing.resize, preprocessing.crop, preprocessing.interpolation) == expected


def test_load_backbone__random_is_the_same_each_time_and_leaves_the_global_generator_alone(resnet18: Backbone) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = load_backbone("resnet18", weights="random")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.weights_digest == resnet18.weights_digest


def test_load_backbone__holds_weights_to_the_expected_digest(resnet18: Backbone, resnet18_file: Path) -> None:
    load_backbone("resnet18", weights="random", expected_digest=resnet18.weights_digest)
    with pytest.raises(WeightsError) as caught:
        load_backbone("resnet18", weights=str(resnet18_file), expected_digest=resnet18.weights_digest)
    found = load_backbone("resnet18", weights=str(resnet18_file)).weights_digest
    assert found in str(caught.value)
    assert resnet18.weights_digest in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_network_with_head__puts_a_new_linear_where_the_old_one_was(name: str) -> None:
    backbone = load_backbone(name, weights="random")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    network = network_with_head(backbone, 3, seed=1)
    same, other = network_with_head(backbone, 3, seed=1), network_with_head(backbone, 3, seed=2)

    assert torch.equal(torch.get_rng_state(), before)
    head = network.get_submodule(backbone.head_path)
    assert isinstance(head, torch.nn.Linear)
    assert torch.equal(head.weight, same.get_submodule(backbone.head_path).weight)
    assert not torch.equal(head.weight, other.get_submodule(backbone.head_path).weight)
    with torch.inference_mode():
        inputs = inputs_of(backbone)
        torch.testing.assert_close(network(inputs), head(backbone.network(inputs)))
    assert isinstance(backbone.network.get_submodule(backbone.head_path), torch.nn.Identity)


@pytest.mark.real
def test_load_backbone__real_weights_classify(real_weights: Path) -> None:
    backbone = load_backbone("resnet18", weights=str(real_weights))
    assert backbone.weights_source["kind"] == "file"
    assert re.fullmatch("[0-9a-f]{64}", backbone.weights_digest)
    state = torch.load(real_weights, weights_only=True)
    assert backbone.classifier is not None
    np.testing.assert_array_equal(backbone.classifier.weight.detach().numpy(), state["fc.weight"].numpy())
