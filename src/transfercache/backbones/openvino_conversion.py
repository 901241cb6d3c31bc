"""From a network in torch to one of OpenVINO, once for each network: see openvino_engine, which keeps the result."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import normalise

# Above openvino itself: it takes care of what that import would do.
from transfercache.backbones.openvino_engine import WAY_OUT, last_line
from transfercache.backbones.registry import Backbone
from transfercache.errors import UsageError
from transfercache.spec import Preprocessing

from openvino.frontend import (  # isort: skip
    FrontEndManager,
    GeneralFailure,
    InitializationFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # isort: skip

# Tracing raises the first, the front end the others.
_CONVERSION_ERRORS = (
    RuntimeError,
    GeneralFailure,
    InitializationFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)


class _FromPixels(nn.Module):
    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self._preprocessing = network, preprocessing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(normalise(pixels, self._preprocessing))
        return features


def convert(backbone: Backbone) -> Any:
    """Return the network with its normalisation as an openvino.Model; raises UsageError where it cannot be one."""
    # By the front end itself: openvino.convert_model, which wraps it, is also there to send usage statistics.
    example = torch.from_numpy(canary_pixels(backbone.preprocessing.crop)[:2])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Tracing is deprecated in favour of torch.export, and warns of every constant: the result is checked.
            warnings.simplefilter("ignore")
            module = _FromPixels(backbone.network, backbone.preprocessing).eval()
            traced = torch.jit.trace(module, example, check_trace=False)
            decoder = TorchScriptPythonDecoder(traced)  # the front end keeps no reference to it
            front_end = FrontEndManager().load_by_framework("pytorch")
            return front_end.convert(front_end.load(decoder))
    except _CONVERSION_ERRORS as error:
        raise UsageError(f"{backbone.name}: OpenVINO cannot convert it ({last_line(error)}); {WAY_OUT}") from error
