from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.heads.linear_head import LinearHead
from transfercache.models.head_file import Model
from transfercache.spec import ExtractSpec


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network that are in this file alone."""
    backbone = load_backbone("mobilenet_v3_small", weights="random")
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    state = backbone.network.state_dict()
    torch.save({name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="session")
def backbone(weights_file: Path) -> Backbone:
    return load_backbone("mobilenet_v3_small", weights=str(weights_file))


@pytest.fixture(scope="session")
def model(backbone: Backbone) -> Model:
    """A head of three classes on the frozen backbone, with its true canary logits."""
    rng = np.random.default_rng(0)
    spec = ExtractSpec(
        backbone=backbone.name,
        weights_digest=backbone.weights_digest,
        boundary=backbone.boundary,
        preprocessing=backbone.preprocessing,
    )
    head = LinearHead(
        # Large, because random weights embed all images near zero.
        weight=rng.normal(0, 100, size=(3, backbone.dim)).astype(np.float32),
        bias=np.array([0.5, -0.5, 0.0], np.float32),
        class_names=("ant", "bee\n[b]", "caf\udce9"),
        spec=spec,
        solver="logistic",
        n_train=12,
        chosen={"C": 1.0, "by": "cross-validation"},
        temperature=1.5,
    )
    embeddings = EagerEngine(backbone, torch.device("cpu")).embed(canary_pixels(spec.preprocessing.crop))
    return Model(
        head=head,
        canary_logits=head.logits(embeddings),
        weights_source=backbone.weights_source,
        reported={"split": "val", "accuracy": 0.75},
    )


@pytest.fixture(scope="session")
def finetuned(model: Model, backbone: Backbone) -> Model:
    """The same head on changed weights, which the model brings along."""
    changed = load_backbone("mobilenet_v3_small", weights="random")
    state = changed.network.state_dict()
    tensors = {name: tensor * 1.25 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    changed.network.load_state_dict(tensors)
    embeddings = EagerEngine(changed, torch.device("cpu")).embed(canary_pixels(224))
    return replace(
        model,
        canary_logits=model.head.logits(embeddings),
        backbone_tensors={name: tensor.numpy() for name, tensor in tensors.items()},
    )
