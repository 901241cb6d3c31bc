from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from transfercache.backbones.available import is_openvino_installed, kept_networks
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.cut import cut_after, frozen_part, share_behind
from transfercache.backbones.engines import EagerEngine, normalise
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.errors import UsageError


class Small(nn.Module):
    """Three linear layers, run as `forward` says."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self._run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self, x)


def test_cut_after__training_the_part_behind_trains_the_network(resnet18: Backbone) -> None:
    network = network_with_head(resnet18, 2, seed=0)
    _, behind = cut_after(network, "layer3", name="resnet18")
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(behind.parameters(), lr=0.1)
    behind(torch.rand(2, 256, 2, 2)).sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, parameter in network.named_parameters() if (parameter != before[name]).any()
    }
    assert changed == {"layer4", "fc"}


def test_cut_after__within_a_module_of_modules() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    before, behind = cut_after(network, "0.0", name="nested")
    x = torch.rand(3, 4)
    assert torch.equal(before(x), network[0][0](x))
    assert torch.equal(behind(before(x)), network(x))
    assert [name for name, _ in behind.named_parameters()] == ["1.weight", "1.bias"]


def test_cut_after__further_inputs_of_a_forward_stay_at_their_defaults() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False) -> torch.Tensor:
            x = self.first(x)
            if mask is not None:
                x = x * mask
            return self.second(x) + (self.second(x) if twice else 0)

    network, x = Masked(), torch.rand(2, 4)
    before, behind = cut_after(network, "first", name="masked")
    assert torch.equal(behind(before(x)), network(x))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.third(m.second(m.first(x)) + x), "what follows also takes what was computed before it"),
        (lambda m, x: m.third(x), "it runs that module 0 times"),
        (lambda m, x: m.third(m.second(m.second(x))), "it runs that module 2 times"),
        (lambda m, x: m.third(x) if m.second(x).sum() > 0 else x, "its forward cannot be traced: "),
        (lambda m, x: (m.second(x), m.third(m.first(x)))[1], "what follows also takes"),
    ],
)
def test_cut_after__no_cut(run: Callable[[nn.Module, torch.Tensor], torch.Tensor], reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        cut_after(Small(run), "second", name="odd")
    message = str(raised.value)
    assert message.startswith(f"odd: it cannot be cut after second ({reason}")
    assert message.endswith("train it on the images, without --cached")


def test_cut_after__the_whole_network() -> None:
    with pytest.raises(UsageError, match="odd: it cannot be cut after its last layer"):
        cut_after(nn.Linear(4, 4), "", name="odd")


def test_frozen_part__is_a_backbone_of_flattened_activations(resnet18: Backbone) -> None:
    part = frozen_part(resnet18, "layer3")
    assert (part.name, part.boundary, part.dim) == ("resnet18", "layer3 256x14x14", 256 * 14 * 14)
    assert (part.weights_digest, part.stages) == (resnet18.weights_digest, resnet18.stages)
    pixels = canary_pixels(resnet18.preprocessing.crop)[:2]
    seen: list[torch.Tensor] = []
    hook = resnet18.network.get_submodule("layer3").register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        resnet18.network(normalise(torch.from_numpy(pixels), resnet18.preprocessing))
    hook.remove()
    features = EagerEngine(part, torch.device("cpu")).embed(pixels)
    np.testing.assert_allclose(features, seen[0].flatten(1), rtol=1e-4, atol=1e-5 * float(seen[0].max()))


def test_frozen_part__unknown_and_last_stage(resnet18: Backbone) -> None:
    with pytest.raises(
        UsageError, match=r"resnet18 has no boundary 'layer4' .*; give one of pooled, layer1, layer2, l"
    ):
        frozen_part(resnet18, "layer4")


@pytest.mark.skipif(not is_openvino_installed(), reason="the extra `openvino` is not installed")
def test_frozen_part__openvino_keeps_a_network_of_its_own(
    resnet18: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transfercache.backbones.openvino_engine import OpenvinoEngine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = replace(resnet18, preprocessing=replace(resnet18.preprocessing, crop=64))
    part, pixels = frozen_part(small, "layer3"), canary_pixels(64)
    OpenvinoEngine(small)
    features, expected = (
        engine.embed(pixels) for engine in (OpenvinoEngine(part), EagerEngine(part, torch.device("cpu")))
    )
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    kept = sorted(folder.name.rsplit("-", 1)[0] for folder in kept_networks().iterdir())
    assert kept == ["resnet18-layer3-256x4x4", "resnet18-pooled"]


def test_share_behind__of_resnet18(resnet18: Backbone) -> None:
    # 1,814 million multiplications in all; layer4 has 411 million: 115.6 three times, 57.8 and 6.4.
    assert share_behind(resnet18, "layer3") == pytest.approx(411.0 / 1813.6, rel=1e-3)
