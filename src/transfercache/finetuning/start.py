"""The head that a run starts from: one that was trained on the cached embeddings of the same backbone (LP-FT)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from transfercache.backbones.registry import Backbone
from transfercache.errors import UsageError
from transfercache.heads.linear_head import LinearHead
from transfercache.spec import ExtractSpec


def match_head(head: LinearHead, *, spec: ExtractSpec, class_names: Sequence[str]) -> LinearHead:
    """Return `head` with its classes in the order of `class_names`, its temperature folded in.

    So the run starts from the probabilities that the head gives (Kumar et al. 2022, "LP-FT"). A class without training
    images in the head, whose logit is out of reach, starts as the least likely of the others. Raises UsageError where
    the head is of other classes, another backbone, or images prepared in another way; how they were decoded, and in
    what precision they were embedded, may differ.
    """
    if set(head.class_names) != set(class_names):
        raise UsageError(
            f"--init-head: its classes are {', '.join(head.class_names)}, and those of the data are "
            f"{', '.join(class_names)}; train a head on this data first (train-head)"
        )
    given = replace(head.spec.preprocessing, decoder=spec.preprocessing.decoder)
    if (head.spec.weights_digest, head.spec.boundary, given) != (
        spec.weights_digest,
        spec.boundary,
        spec.preprocessing,
    ):
        raise UsageError(
            f"--init-head: it was trained on features of {head.spec.backbone} with weights or preprocessing other than "
            f"those of this {spec.backbone}; pass --backbone and --weights as they were then"
        )
    order = [head.class_names.index(name) for name in class_names]
    weight, bias = head.weight / head.temperatures[:, None], head.bias / head.temperatures
    bias = np.where(head.is_trained, bias, bias[head.is_trained].min())
    return replace(head, weight=weight[order], bias=bias[order], class_names=tuple(class_names), temperature=1.0)


def put_head(network: nn.Module, backbone: Backbone, head: LinearHead) -> None:
    """Copy a matched head into the one of `network`."""
    linear = network.get_submodule(backbone.head_path)
    linear.load_state_dict({"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)})


def head_digest(head: LinearHead) -> str:
    """Return 64 hex digits that change with any weight."""
    return hashlib.sha256(head.weight.tobytes() + head.bias.tobytes()).hexdigest()
