"""A MODEL as something that runs: the backbone it names, loaded, verified, and checked against its canaries.

Torch is loaded where there are tensors to put into a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.backbones.available import DEFAULT, RANDOM
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.choice import Choice, Engine
from transfercache.backbones.known import FrozenBackbone, find_backbone
from transfercache.errors import ModelError, UsageError, WeightsError
from transfercache.models.head_file import Model, check_canaries
from transfercache.spec import ExtractSpec


def checked_engine(model: Model, path: Path, backbone: FrozenBackbone, *, choice: Choice) -> Engine:
    """Return the engine of a model's `backbone`; raises ModelError where its canary logits are not those saved."""
    engine = choice.build(backbone)
    features = engine.embed(canary_pixels(model.head.spec.preprocessing.crop))  # float32 [4, D]
    check_canaries(path, model, features)
    return engine


def load_frozen(spec: ExtractSpec, source: Mapping[str, str], *, weights: str | None) -> FrozenBackbone:
    """Return the backbone of `spec`, its weights from `weights`, or, where that is None, from where they came.

    `source` is what a cache or a model keeps of that. Raises WeightsError where they cannot be had or have another
    digest.
    """
    origin = {"file": source.get("where", ""), "random": RANDOM}.get(source.get("kind", ""), DEFAULT)
    return find_backbone(spec.backbone, weights=weights or origin, expected_digest=spec.weights_digest)


def frozen_tensors(spec: ExtractSpec, source: Mapping[str, str], *, weights: str | None) -> dict[str, npt.NDArray[Any]]:
    """Return name -> tensor of the backbone that `load_frozen` returns, for a model that is to hold them."""
    network = load_frozen(spec, source, weights=weights).load().network
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def load_backbone_of(model: Model, path: Path, *, weights: str | None) -> FrozenBackbone:
    """Return the backbone of `model`, which was read from `path`: from its own tensors, else as `load_frozen` does.

    Raises WeightsError where its weights are not to be had, and ModelError where this machine's torchvision or timm
    does not know the backbone, or the tensors in the file do not fit it.
    """
    spec = model.head.spec
    try:
        if model.is_finetuned:
            return _from_tensors(model.backbone_tensors, spec, path)
        if weights is not None or not model.bundled_tensors:
            _check_still_there(model, path, weights=weights)
            return load_frozen(spec, model.weights_source, weights=weights)
        backbone = _from_tensors(model.bundled_tensors, spec, path)
    except UsageError as error:
        raise ModelError(
            f"{path}: its backbone cannot be built here ({error}); install the versions that its model card names"
        ) from error
    if backbone.weights_digest != spec.weights_digest:
        raise ModelError(f"{path}: the backbone bundled in it fails its digest; train it again, or pass --weights PATH")
    return backbone


def _check_still_there(model: Model, path: Path, *, weights: str | None) -> None:
    source, spec = model.weights_source, model.head.spec
    if weights is None and source.get("kind") == "file" and not Path(source.get("where", "")).is_file():
        raise WeightsError(
            f"{source.get('where')}: no such file, and {path} needs these weights of {spec.backbone} (digest "
            f"{spec.weights_digest[:12]}...); pass --weights PATH with where they are now"
        )


def _from_tensors(arrays: Mapping[str, npt.NDArray[Any]], spec: ExtractSpec, path: Path) -> FrozenBackbone:
    import torch

    from transfercache.backbones.registry import load_backbone
    from transfercache.backbones.weights import weights_digest

    backbone = load_backbone(spec.backbone, weights=RANDOM)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    try:
        backbone.network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: its backbone is not a {spec.backbone} ({str(error).splitlines()[-1].strip()})"
        ) from error
    # What it was made with, which for a published model need not be today's default.
    digest = weights_digest(backbone.network.state_dict())
    return replace(backbone, preprocessing=spec.preprocessing, weights_digest=digest)
