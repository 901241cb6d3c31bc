"""Backbones and files of weights that several test files of this room read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from transfercache.backbones.registry import Backbone, load_backbone


@pytest.fixture(scope="session")
def resnet18() -> Backbone:
    """A resnet18 with the weights of `random`."""
    return load_backbone("resnet18", weights="random")


@pytest.fixture(scope="session")
def resnet18_state() -> dict[str, torch.Tensor]:
    """A state_dict of torchvision's resnet18 as one would save it, batch-norm statistics not at their start."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        network = torchvision.models.resnet18()
        network(torch.rand(2, 3, 64, 64))
    return network.state_dict()


@pytest.fixture
def resnet18_file(tmp_path: Path, resnet18_state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18_state, path)
    return path
