"""What must hold for every family of torchvision: one network built for each, and all its tests run on it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from transfercache.backbones.available import is_openvino_installed
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.cut import cut_after
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.backbones.stages import parameter_stage

CPU = torch.device("cpu")

# The smallest member of each family, and the width of its embedding.
SMALLEST = {
    "alexnet": 4096,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "efficientnet_v2_s": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "resnext50_32x4d": 2048,
    "shufflenet_v2_x0_5": 1024,
    "swin_t": 768,
    "swin_v2_t": 768,
    "vgg11": 4096,
    "vit_b_32": 768,
}

# These take one size of image; the others are tested at a quarter of the pixels.
ONE_SIZE = ("maxvit_t", "vit_b_32")


@pytest.fixture(scope="module", params=list(SMALLEST))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param, weights="random")


def pixels_for(backbone: Backbone) -> np.ndarray:
    return canary_pixels(backbone.preprocessing.crop if backbone.name in ONE_SIZE else 96)[:2]


def torchvision_inputs(backbone: Backbone) -> torch.Tensor:
    """What a plain torchvision script makes of the pixels: ToTensor and Normalize, in NCHW memory."""
    steps = Compose([ToTensor(), Normalize(backbone.preprocessing.mean, backbone.preprocessing.std)])
    return torch.stack([steps(Image.fromarray(image)) for image in pixels_for(backbone)]).contiguous()


def untouched(backbone: Backbone) -> torch.nn.Module:
    """torchvision's own network with the same tensors, its head and auxiliary heads in place."""
    inception = backbone.name in ("googlenet", "inception_v3")
    options = {"init_weights": False, "transform_input": True} if inception else {}
    # RegNet computes its widths with tensors, so it cannot be built without memory.
    with torch.device("cpu" if backbone.name.startswith("regnet") else "meta"):
        network = torchvision.models.get_model(backbone.name, weights=None, **options).eval()
    assert backbone.classifier is not None
    state = backbone.network.state_dict()
    state.update({f"{backbone.head_path}.{key}": value for key, value in backbone.classifier.state_dict().items()})
    unmatched = network.load_state_dict(state, strict=False, assign=True)
    assert unmatched.unexpected_keys == []
    assert inception == any(name.lower().startswith("aux") for name in unmatched.missing_keys)
    assert all(name.lower().startswith("aux") for name in unmatched.missing_keys)
    return network


def test_pooled__times_the_classifier_is_the_networks_logits(backbone: Backbone) -> None:
    classifier, inputs = backbone.classifier, torchvision_inputs(backbone)
    assert classifier is not None
    with torch.inference_mode():
        features, logits = backbone.network(inputs), untouched(backbone)(inputs)
        bias = 0 if classifier.bias is None else classifier.bias  # MaxViT's has none
        products = features @ classifier.weight.T + bias
    assert features.shape == (2, backbone.dim) == (2, SMALLEST[backbone.name])
    torch.testing.assert_close(products, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert not torch.equal(features[0], features[1])


def test_embed__equals_plain_torchvision_in_nchw(backbone: Backbone) -> None:
    features = EagerEngine(backbone, CPU).embed(pixels_for(backbone))
    with torch.inference_mode():
        expected = copy.deepcopy(backbone.network)(torchvision_inputs(backbone)).numpy()
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not is_openvino_installed(), reason="the extra `openvino` is not installed")
def test_embed__by_openvino_equals_eager(backbone: Backbone) -> None:
    from transfercache.backbones.openvino_engine import OpenvinoEngine

    pixels = pixels_for(backbone)
    cut = replace(backbone, preprocessing=replace(backbone.preprocessing, crop=pixels.shape[1]))
    features, expected = (engine.embed(pixels) for engine in (OpenvinoEngine(cut), EagerEngine(cut, CPU)))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_backbone__is_in_eval_mode_and_has_its_stages(backbone: Backbone) -> None:
    assert not any(module.training for module in backbone.network.modules())
    assert all(backbone.network.get_submodule(stage.ends_at) is not None for stage in backbone.stages)
    assert isinstance(backbone.network.get_submodule(backbone.head_path), torch.nn.Identity)


def test_cut_after__every_stage_gives_the_network_bit_for_bit(backbone: Backbone) -> None:
    inputs = torchvision_inputs(backbone)
    stage_of = parameter_stage(backbone.network, backbone.stages, backbone.head_path)
    names = [stage.name for stage in backbone.stages]
    with torch.inference_mode():
        expected = backbone.network(inputs)
        for number, stage in enumerate(backbone.stages[:-1]):
            before, behind = cut_after(backbone.network, stage.ends_at, name=backbone.name)
            assert torch.equal(behind(before(inputs)), expected), stage
            # What trains lies behind the stage before it, and nothing lies on both sides.
            assert {stage_of[name] for name, _ in before.named_parameters()} == set(names[: number + 1])
            assert {stage_of[name] for name, _ in behind.named_parameters()} == set(names[number + 1 :])
