"""Frozen batch norm folded into the convolution before it, in training: the norm's own passes are saved.

norm(conv(x; w)) = conv(x; s w) + (b - s mean), with s = gamma / sqrt(variance + eps) a channel (Jacob et al. 2018,
section 3.2, there for inference). Gradients go through s to gamma as before, and what the convolution gives is not
kept for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transfercache.backbones.architecture import meta_output


class _FoldingConv(nn.Conv2d):
    """A convolution that also does what the norm after it would, where it trains and the norm's statistics do not."""

    norm: tuple[_FoldedNorm]  # in a tuple, so that it is no module within this one

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (norm,) = self.norm
        norm.is_done = self.training and not norm.training
        if not norm.is_done:
            return super().forward(input)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        output: torch.Tensor = self._conv_forward(input, self.weight * scale[:, None, None, None], shift)
        return output


class _FoldedNorm(nn.BatchNorm2d):
    """A norm that lets pass what the convolution before it, which alone feeds it, has done for it."""

    is_done = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self.is_done else super().forward(input)


def fold_norms(network: nn.Module, crop: int) -> int:
    """Let each convolution of `network` do the work of the norm that alone takes its output; return how many do.

    Only while the convolution is in train mode and the norm is not: evaluation stays what it is. Names, parameters and
    state_dict stay too. `crop` is the side of its images in pixels. A convolution or norm that is a subclass, runs more
    than once or has no parameters of its own is left alone. `network` is in eval mode.
    """
    pairs = list(_pairs(network, crop))
    for conv, norm in pairs:
        # Their classes are changed, and not the modules: optimiser, names and graphs cut from the network hold these.
        conv.__class__, norm.__class__ = _FoldingConv, _FoldedNorm
        vars(conv)["norm"] = (norm,)  # as it is typed after the change of class
    return len(pairs)


def _pairs(network: nn.Module, crop: int) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield each convolution and the norm that alone takes its output, as one image shows them."""
    made_by: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # by id: the tensors are held, so that theirs stay apart
    taken_by: dict[int, nn.BatchNorm2d] = {}
    runs: Counter[nn.Module] = Counter()

    def take_output(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        runs[conv] += 1
        made_by[id(output)] = conv, output
        uses.count[id(output)] = 0  # those so far were of one that is gone and had this id

    def take_input(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        runs[norm] += 1
        if id(inputs[0]) in made_by:
            taken_by[id(inputs[0])] = norm

    with ExitStack() as stack:
        uses = stack.enter_context(_Uses())
        for module in network.modules():
            if type(module) is nn.Conv2d:
                stack.callback(module.register_forward_hook(take_output).remove)
            elif type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
                stack.callback(module.register_forward_pre_hook(take_input).remove)
        meta_output(network, crop)
    for at, norm in taken_by.items():
        conv, _ = made_by[at]
        if runs[conv] == runs[norm] == uses.count[at] == 1:
            yield conv, norm


class _Uses(TorchDispatchMode):
    """Counts how many operations take each tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(one, torch.Tensor):
                    self.count[id(one)] += 1
        return func(*args, **(kwargs or {}))
