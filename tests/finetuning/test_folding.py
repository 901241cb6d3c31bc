from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from transfercache.backbones.registry import load_backbone, network_with_head
from transfercache.finetuning.folding import fold_norms
from transfercache.finetuning.groups import set_training_modes

CROP = 32


def with_statistics(network: nn.Module) -> nn.Module:
    """The same, its norms being no identity."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor)
    return network


def outputs_and_gradients(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    output = network.double()(torch.randn(3, 3, CROP, CROP, dtype=torch.float64))
    output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "n_folded"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("densenet121", 59), ("vit_b_16", 0)]
)
def test_fold__gives_the_same_outputs_and_gradients(name: str, n_folded: int) -> None:
    backbone = load_backbone(name, weights="random")
    plain = with_statistics(network_with_head(backbone, 3, seed=0))
    folded = copy.deepcopy(plain)
    assert fold_norms(folded, backbone.preprocessing.crop) == n_folded
    assert list(folded.state_dict()) == list(plain.state_dict())
    if not n_folded:
        return
    for network in (plain, folded):
        set_training_modes(network, batch_norm="frozen")
        network.apply(lambda module: module.eval() if isinstance(module, nn.Dropout) else module)
    output, gradients = outputs_and_gradients(plain)
    own_output, own_gradients = outputs_and_gradients(folded)
    torch.testing.assert_close(own_output, output, rtol=1e-9, atol=1e-12)
    assert own_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[parameter], gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max())


def test_fold__changes_no_bit_of_an_evaluation_and_nothing_where_the_norms_train() -> None:
    backbone = load_backbone("resnet18", weights="random")
    plain = with_statistics(network_with_head(backbone, 3, seed=0))
    folded = copy.deepcopy(plain)
    fold_norms(folded, backbone.preprocessing.crop)
    for network in (plain, folded):
        network.double().eval()
    images = torch.randn(2, 3, CROP, CROP, dtype=torch.float64)
    torch.testing.assert_close(folded(images), plain(images), rtol=0, atol=0)
    for network in (plain, folded):
        set_training_modes(network, batch_norm="train")
    torch.testing.assert_close(folded(images), plain(images), rtol=0, atol=0)
    for name, tensor in plain.state_dict().items():  # running statistics among them
        torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=0, atol=0)


class OwnConv(nn.Conv2d):
    """A subclass, whose forward may be another."""


class Unusual(nn.Module):
    """Convolutions whose outputs a norm is not alone with, and one pair that is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.also_used, self.twice = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.own = OwnConv(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
        self.bare = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.plain(x))
        kept = self.also_used(x)
        x = self.norms[1](kept) + kept
        x = self.norms[2](self.twice(self.twice(x)))
        x = self.norms[3](self.own(x))
        x = self.bare(nn.functional.relu(x))
        return x.mean((2, 3))


def test_fold__leaves_alone_what_more_than_the_norm_takes() -> None:
    network = Unusual()
    assert fold_norms(network, CROP) == 1
    plain = {name for name, module in network.named_modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)}
    assert plain == {"also_used", "twice", "norms.1", "norms.2", "norms.3", "bare"}


def test_fold__of_a_convolution_with_a_bias() -> None:
    torch.manual_seed(0)
    plain = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    folded = copy.deepcopy(plain)
    assert fold_norms(folded, CROP) == 1
    for network in (plain, folded):
        set_training_modes(network, batch_norm="frozen")
    output, gradients = outputs_and_gradients(plain)
    own_output, own_gradients = outputs_and_gradients(folded)
    torch.testing.assert_close(own_output, output, rtol=1e-9, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-9, atol=1e-9)
