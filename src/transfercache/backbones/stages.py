"""Where each family is cut into stages: a fixed record, because stage names become part of digests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """A run of layers that ends with the module at the dotted path `ends_at` ("" is the whole network)."""

    name: str
    ends_at: str


# Family -> (members as a pattern, where each stage ends). Cut where the resolution halves, so that stage k of one
# network is comparable with stage k of another; a transformer without strides is cut into four equal parts. The first
# pattern that matches the whole name counts.
_RECORD: tuple[tuple[str, str], ...] = (
    (r"(wide_)?resnet\d+(_2)?|resnext.*", "layer1 layer2 layer3 layer4"),
    (r"alexnet", "features.2 features.5 features.12"),
    (r"convnext_.*", "features.1 features.3 features.5 features.7"),
    (r"densenet.*", "features.denseblock1 features.denseblock2 features.denseblock3 features.norm5"),
    (r"efficientnet_b\d", "features.1 features.2 features.3 features.5 features.8"),
    (r"efficientnet_v2_s", "features.1 features.2 features.3 features.5 features.7"),
    (r"efficientnet_v2_[ml]", "features.1 features.2 features.3 features.5 features.8"),
    (r"efficientnet_lite0", "blocks.0 blocks.1 blocks.2 blocks.4 bn2"),
    (r"googlenet", "conv3 inception3b inception4e inception5b"),
    (r"inception_v3", "Conv2d_2b_3x3 Conv2d_4a_3x3 Mixed_5d Mixed_6e Mixed_7c"),
    (r"maxvit_t", "blocks.0 blocks.1 blocks.2 blocks.3"),
    (r"mnasnet.*", "layers.7 layers.8 layers.9 layers.11 layers.16"),
    (r"mobilenet_v2", "features.1 features.3 features.6 features.13 features.18"),
    (r"mobilenet_v3_large", "features.1 features.3 features.6 features.12 features.16"),
    (r"mobilenet_v3_small", "features.0 features.1 features.3 features.8 features.12"),
    (r"regnet_.*", "trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output.block4"),
    (r"shufflenet_.*", "maxpool stage2 stage3 conv5"),
    (r"swin_.*", "features.1 features.3 features.5 features.7"),
    (r"vgg11", "features.2 features.5 features.10 features.15 features.20"),
    (r"vgg11_bn", "features.3 features.7 features.14 features.21 features.28"),
    (r"vgg13", "features.4 features.9 features.14 features.19 features.24"),
    (r"vgg13_bn", "features.6 features.13 features.20 features.27 features.34"),
    (r"vgg16", "features.4 features.9 features.16 features.23 features.30"),
    (r"vgg16_bn", "features.6 features.13 features.23 features.33 features.43"),
    (r"vgg19", "features.4 features.9 features.18 features.27 features.36"),
    (r"vgg19_bn", "features.6 features.13 features.26 features.39 features.52"),
    (r"vit_b_.*", " ".join(f"encoder.layers.encoder_layer_{index}" for index in (2, 5, 8, 11))),
    (r"vit_l_.*", " ".join(f"encoder.layers.encoder_layer_{index}" for index in (5, 11, 17, 23))),
    (r"vit_h_.*", " ".join(f"encoder.layers.encoder_layer_{index}" for index in (7, 15, 23, 31))),
)


def stages_of(name: str) -> tuple[Stage, ...]:
    """Return the stages of a torchvision model or of efficientnet_lite0, first to last.

    ResNets keep their own names (layer1 ... layer4), all others have stage1 ... stageK. Raises KeyError for a name
    that the record lacks.
    """
    for pattern, ends in _RECORD:
        if re.fullmatch(pattern, name):
            return numbered_stages(ends.split())
    raise KeyError(f"{name}: no stages on record")


def numbered_stages(ends: Sequence[str]) -> tuple[Stage, ...]:
    """Name the stages that end at these modules, in order: layerK where the module is called so, else stageK."""
    return tuple(
        Stage(end if end == f"layer{number}" else f"stage{number}", end) for number, end in enumerate(ends, start=1)
    )


def parameter_stage(network: nn.Module, stages: Sequence[Stage], head_path: str) -> dict[str, str]:
    """Return for every parameter of `network`, in its order, the name of its stage, or "head" for those in `head_path`.

    A stage owns what lies after the end of the one before, up to and including the module it ends at, in the order in
    which modules are defined; the stem is the first stage's, and what follows the last stage is the last stage's.
    """
    owner: dict[str, str] = {}
    index, is_inside = 0, False
    for path, module in network.named_modules():
        if is_inside and not _is_within(path, stages[index].ends_at):
            index = min(index + 1, len(stages) - 1)
        is_inside = _is_within(path, stages[index].ends_at)
        stage = HEAD if _is_within(path, head_path) else stages[index].name
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            owner[name] = stage
    return owner


def _is_within(path: str, folder: str) -> bool:
    return folder in ("", path) or path.startswith(f"{folder}.")
