"""The classification models of torchvision.models, and their weights enums."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from transfercache.backbones.architecture import Architecture, LoadedWeights
from transfercache.backbones.stages import stages_of
from transfercache.backbones.weights import read_state
from transfercache.errors import DownloadError, WeightsError
from transfercache.fetch import download
from transfercache.spec import Preprocessing

# Built without the auxiliary heads, which run in training only and change what the network returns. Published
# weights of both want their input re-scaled from ImageNet's mean and std to 0.5 (transform_input).
_INCEPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": False},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": False},
}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")

# Published DenseNets and vision transformers still carry the names of older torchvision versions.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)

# The largest published file, regnet_y_128gf's, has 2.6 GB.
_MAX_BYTES = 4 << 30

# torch.hub's rule: the digits between the last dash and the ending are the start of the file's SHA-256.
_DIGITS = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification models, sorted; some of them have no embedding (SqueezeNet)."""
    return list(models.list_models(module=models))


def torchvision_architecture(name: str) -> Architecture:
    """Describe one of `torchvision_names()`; its preprocessing is that of torchvision's DEFAULT weights.

    The same holds for weights from a file and for random ones: a file does not say how its images were resized, and
    DEFAULT is the documented recipe of this architecture (some are resized to 232 where older weights had 256).
    """
    weights = models.get_model_weights(name).DEFAULT
    preprocessing = _preprocessing(weights.transforms())
    options = dict(_INCEPTIONS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = preprocessing.crop  # its position embeddings have that size
    return Architecture(
        name=name,
        preprocessing=preprocessing,
        build=partial(_build, name, options),
        call=f"torchvision.models.{name}(num_classes={{}}{''.join(f', {key}={options[key]}' for key in options)})",
        stages=lambda network: stages_of(name),
        default_weights=partial(_default_weights, weights),
        own_name=_own_name,
    )


def _build(name: str, options: dict[str, Any], num_classes: int | None = None) -> nn.Module:
    classes = {} if num_classes is None else {"num_classes": num_classes}
    network: nn.Module = models.get_model(name, weights=None, **options, **classes)
    return network


def _own_name(name: str) -> str | None:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return None if name.startswith(_AUXILIARY) else name


def _preprocessing(transforms: Any) -> Preprocessing:
    return Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        antialias=bool(transforms.antialias),
    )


def _default_weights(weights: Any) -> LoadedWeights:
    licence = weights.meta.get("license", "none stated by torchvision; trained on ImageNet-1K")
    source = {"kind": "default", "where": weights.url, "licence": licence}
    path = _checkpoint(weights.url)
    return LoadedWeights(read_state(path), source, path)


def _checkpoint(url: str) -> Path:
    """Return the file of `url` in torch.hub's folder, downloaded where it is missing, its SHA-256 checked every time.

    torch.hub itself checks only what it downloads, so a file torn or swapped later would be served.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    match = _DIGITS.search(path.name)
    if match is None:
        raise WeightsError(f"{url}: its name holds no digest to check; pass the file with --weights PATH")
    try:
        return download(url, path, sha256=match[1], max_bytes=_MAX_BYTES)
    except DownloadError as error:
        raise DownloadError(f"{error}, or pass --weights PATH") from error
