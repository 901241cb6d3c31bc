"""A backbone before its weights: how it is built, what it expects, and where its head is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from transfercache.backbones.stages import Stage
from transfercache.errors import UsageError
from transfercache.spec import Preprocessing


@dataclass(frozen=True)
class LoadedWeights:
    """A state_dict by the network's own names, and where it came from (`kind`, `where`, `licence`)."""

    state: Mapping[str, torch.Tensor]
    source: dict[str, str]
    file: Path | None = None  # the one that it was read from, where tlc knows it


@dataclass(frozen=True)
class Architecture:
    """What an adapter knows of one backbone; nothing is built or fetched until it is asked for."""

    name: str
    preprocessing: Preprocessing
    #: With its own random weights, drawn from torch's global generator; `num_classes` is the one argument it takes.
    build: Callable[..., nn.Module]
    call: str  # the same in plain Python, {} standing for the number of classes
    stages: Callable[[nn.Module], tuple[Stage, ...]]
    default_weights: Callable[[], LoadedWeights]
    #: From a tensor's name in a published file to the network's own; None for a layer that is not built.
    own_name: Callable[[str], str | None] = str


@dataclass(frozen=True)
class Head:
    """Where a network's head is: an nn.Linear, or an nn.Identity where the network ends in its embedding."""

    path: str  # dotted
    dim: int  # D, the width of the embedding


def find_head(network: nn.Module, *, name: str, crop: int) -> Head:
    """Find the last nn.Linear that runs, whose output is the output of `network` (in eval mode).

    One pass is traced on the meta device: no arithmetic, no memory. A network with no such layer but with an
    nn.Identity in its place (timm's num_classes=0) has its head there. Raises UsageError for any other network.
    """
    ran: dict[type[nn.Module], tuple[str, torch.Tensor]] = {}  # the last of each type
    with_weights: list[str] = []  # types of layers

    def note(path: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        kind = nn.Linear if isinstance(module, nn.Linear) else type(module)
        ran[kind] = (path, output)
        if next(module.parameters(), None) is not None:
            with_weights.append(kind.__name__)

    with ExitStack() as hooks:
        for path, module in network.named_modules():
            # The leaves: nn.MultiheadAttention holds an nn.Linear that never runs as a module, which hooks do not see.
            if next(module.children(), None) is None:
                hooks.enter_context(module.register_forward_hook(partial(note, path)))
        output = meta_output(network, crop)
    for kind in (nn.Linear, nn.Identity):
        path, produced = ran.get(kind, ("", None))
        if produced is output and output.ndim == 2:
            module = network.get_submodule(path)
            return Head(path, module.in_features if isinstance(module, nn.Linear) else output.shape[1])
    ending = "a convolution" if with_weights[-1] == "Conv2d" else f"a layer of type {with_weights[-1]}"
    raise UsageError(
        f"{name} ends in {ending}, not in one nn.Linear, so it has no embedding for a linear head; "
        "choose another backbone, for instance resnet18"
    )


def meta_output(network: nn.Module, crop: int) -> torch.Tensor:
    """Return what one image of crop x crop pixels gives, on the meta device: its shape, and no numbers."""
    tensors = {name: tensor.to("meta") for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    image = torch.zeros(1, 3, crop, crop, device="meta")
    with torch.inference_mode():
        output: torch.Tensor = functional_call(network, tensors, (image,))
    return output
