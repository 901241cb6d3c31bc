"""The engine for CPUs: OpenVINO, with the converted network kept, and the precision pinned to what was asked for."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from transfercache.backbones.available import OPENVINO, kept_networks
from transfercache.backbones.engines import EagerEngine, canary_pixels, normalise
from transfercache.backbones.registry import Backbone
from transfercache.backbones.weights import weights_digest
from transfercache.environment import installed_versions
from transfercache.errors import ResourceError, UsageError
from transfercache.fetch import whole_folder
from transfercache.files import sha256_file
from transfercache.spec import Preprocessing

# Its mere import tells Google Analytics that it was imported, unless the package that does so is not there.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # what makes an import fail
import openvino as ov  # noqa: E402
from openvino.frontend import (  # noqa: E402
    FrontEndManager,
    GeneralFailure,
    InitializationFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: E402

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
# Of the largest feature: engines differ by some 1e-6 of it, a conversion that went wrong by far more.
_TOLERANCE = 1e-4
_WAY_OUT = "pass --engine eager"
# Tracing raises the first, the front end the others.
_CONVERSION_ERRORS = (
    RuntimeError,
    GeneralFailure,
    InitializationFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
_GRAPH, _TENSORS, _CONTENTS = "network.xml", "network.bin", "contents.json"

logger = logging.getLogger(__name__)


class OpenvinoEngine:
    """A converted network on the CPU; its features in fp32 are those of `EagerEngine` within 1e-4 of the largest."""

    name = OPENVINO

    def __init__(self, backbone: Backbone, *, compute: str = "fp32") -> None:
        """Open the kept conversion of this network, or convert it.

        Raises UsageError where OpenVINO cannot do that, ResourceError where the conversion can be written nowhere.
        """
        self._network = _open_network(backbone)
        self._precision = _PRECISIONS[compute]
        self._compiled: Any = None
        self._shape: tuple[int, ...] = ()

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 [B, D] for uint8 [B, H, W, 3], row by row; done when it returns."""
        if pixels.shape != self._shape:
            self._compiled = None  # one at a time: each holds the weights once more
            self._compiled = _compile(self._network, pixels.shape, precision=self._precision)
            self._shape = pixels.shape
        features: NDArray[np.float32] = self._compiled([pixels])[0]
        return features


def _compile(network: Any, shape: tuple[int, ...], *, precision: str) -> Any:
    """Compile for one shape [B, H, W, 3]: fixed shapes run faster than open ones."""
    fixed = network.clone()
    fixed.reshape(list(shape))
    properties = {
        "PERFORMANCE_HINT": "LATENCY",  # all cores on one batch; two streams of half a batch were no faster
        # Left to itself, OpenVINO computes in bfloat16 on a processor that has it.
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # decoding shares the cores: a pinned thread would wait for it
    }
    return ov.Core().compile_model(fixed, "CPU", properties)


def _open_network(backbone: Backbone) -> Any:
    """Return the network with its normalisation, uint8 [?, H, W, 3] -> float32 [?, D], as an openvino.Model."""
    digest = weights_digest(backbone.network.state_dict())  # of what is there: a fine-tuned network has its own
    preprocessing = backbone.preprocessing
    versions = installed_versions()
    identity = {
        "backbone": backbone.name,
        "weights_digest": digest,
        "boundary": backbone.boundary,
        "crop": preprocessing.crop,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        # Those whose code was traced, or did it.
        "versions": {name: versions[name] for name in ("torch", "torchvision", "timm", OPENVINO) if name in versions},
    }
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{backbone.name}-{backbone.boundary}-{digest[:16]}")
    folder = kept_networks() / name
    if folder.exists():
        if _is_whole(folder, identity):
            return _read(folder)
        logger.warning("%s: damaged, or made by other versions; the network is converted again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    converted = _convert(backbone)
    # What runs is the saved form in any case: OpenVINO rewrites it a little, and the last bits of a row are to be the
    # same in the run that goes on with this one.
    try:
        with whole_folder(folder) as temporary:
            return _save(converted, temporary, backbone, identity)
    except ResourceError as error:
        logger.warning("%s: the converted network is not kept (%s)", folder, error)
    with TemporaryDirectory() as temporary:
        return _save(converted, Path(temporary), backbone, identity)


class _FromPixels(nn.Module):
    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self._preprocessing = network, preprocessing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(normalise(pixels, self._preprocessing))
        return features


def _convert(backbone: Backbone) -> Any:
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
        raise UsageError(f"{backbone.name}: OpenVINO cannot convert it ({_reason(error)}); {_WAY_OUT}") from error


def _save(converted: Any, folder: Path, backbone: Backbone, identity: dict[str, Any]) -> Any:
    """Write a network that is true to its backbone, and return it as the next process will read it."""
    try:
        ov.save_model(converted, folder / _GRAPH, compress_to_fp16=False)
        network = _read(folder)
    except RuntimeError as error:
        raise ResourceError(
            f"{folder}: cannot be written ({_reason(error)}); free some space, or {_WAY_OUT}"
        ) from error
    _check_conversion(network, backbone)
    contents = {"identity": identity, "sha256": _digests(folder)}
    (folder / _CONTENTS).write_text(json.dumps(contents, indent=1))
    return network


def _read(folder: Path) -> Any:
    return ov.Core().read_model(folder / _GRAPH)


def _check_conversion(network: Any, backbone: Backbone) -> None:
    pixels = canary_pixels(backbone.preprocessing.crop)
    expected = EagerEngine(backbone, torch.device("cpu")).embed(pixels)  # float32 [4, D]
    found = _compile(network, pixels.shape, precision="f32")([pixels])[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        raise UsageError(
            f"{backbone.name}: as OpenVINO converts it, its embeddings are off by {error:.2g} of the largest feature; "
            f"{_WAY_OUT}"
        )


def _is_whole(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a kept network is of this identity, and each of its bytes as it was written."""
    try:
        contents = json.loads((folder / _CONTENTS).read_bytes())
        digests = _digests(folder)
    except (OSError, ValueError):
        return False
    return bool(contents == {"identity": identity, "sha256": digests})


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in (_GRAPH, _TENSORS)}


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[-1]
