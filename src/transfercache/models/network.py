"""A MODEL as something that runs: the backbone it names, loaded, verified, and checked against its canaries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from transfercache.backbones.engines import EagerEngine, canary_pixels
from transfercache.backbones.registry import DEFAULT, RANDOM, Backbone, load_backbone
from transfercache.errors import ModelError
from transfercache.models.head_file import Model, check_canaries


def load_engine(model: Model, path: Path, *, weights: str | None, device: torch.device) -> EagerEngine:
    """Return the engine that embeds images for `model`, which was read from `path`.

    `weights` says where the backbone's weights are, where they are not where they came from. Raises WeightsError
    where they cannot be had or have another digest, ModelError where a fine-tuned model does not fit its backbone or
    the canary logits differ from those that were saved.
    """
    engine = EagerEngine(_load_backbone(model, path, weights=weights), device)
    features = engine.embed(canary_pixels(model.head.spec.preprocessing.crop))  # float32 [4, D]
    check_canaries(path, model, features)
    return engine


def _load_backbone(model: Model, path: Path, *, weights: str | None) -> Backbone:
    spec = model.head.spec
    if not model.is_finetuned:
        source = model.weights_source
        origin = {"file": source.get("where", ""), "random": RANDOM}.get(source.get("kind", ""), DEFAULT)
        return load_backbone(spec.backbone, weights=weights or origin, expected_digest=spec.weights_digest)
    backbone = load_backbone(spec.backbone, weights=RANDOM)
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in model.backbone_tensors.items()}
    try:
        backbone.network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: its backbone is not a {spec.backbone} ({str(error).splitlines()[-1].strip()})"
        ) from error
    # What it was made with, which for a published model need not be today's default.
    return replace(backbone, preprocessing=spec.preprocessing)
