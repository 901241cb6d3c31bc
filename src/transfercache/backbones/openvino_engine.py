"""The engine for CPUs: OpenVINO, with the converted network kept, and the precision pinned to what was asked for."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transfercache.backbones.available import OPENVINO, kept_networks
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.known import FrozenBackbone
from transfercache.environment import installed_versions
from transfercache.errors import ResourceError, UsageError
from transfercache.fetch import whole_folder
from transfercache.files import sha256_file

# Its mere import tells Google Analytics that it was imported, unless the package that does so is not there.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # what makes an import fail
import openvino as ov  # noqa: E402

if TYPE_CHECKING:
    from transfercache.backbones.registry import Backbone

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
# Of the largest feature: engines differ by some 1e-6 of it, a conversion that went wrong by far more.
_TOLERANCE = 1e-4
WAY_OUT = "pass --engine eager"
_GRAPH, _TENSORS, _CONTENTS = "network.xml", "network.bin", "contents.json"

logger = logging.getLogger(__name__)


class OpenvinoEngine:
    """A converted network on the CPU; its features in fp32 are those of `EagerEngine` within 1e-4 of the largest."""

    def __init__(self, backbone: FrozenBackbone, *, compute: str = "fp32") -> None:
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


@functools.cache
def _core() -> Any:
    """Return OpenVINO's runtime, one for the process.

    On a processor with AMX each sets a stack for signal handlers, and puts back what was there before when it goes. Of
    two that do not go in the reverse order of their coming, the last puts back memory that the first has given up, and
    the next signal, Ctrl-C's among them, ends the process.
    """
    return ov.Core()


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
    return _core().compile_model(fixed, "CPU", properties)


def _open_network(backbone: FrozenBackbone) -> Any:
    """Return the network with its normalisation, uint8 [?, H, W, 3] -> float32 [?, D], as an openvino.Model."""
    preprocessing, digest = backbone.preprocessing, backbone.weights_digest
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
    from transfercache.backbones.openvino_conversion import convert

    loaded = backbone.load()
    converted = convert(loaded)
    # What runs is the saved form in any case: OpenVINO rewrites it a little, and the last bits of a row are to be the
    # same in the run that goes on with this one.
    try:
        with whole_folder(folder) as temporary:
            return _save(converted, temporary, loaded, identity)
    except ResourceError as error:
        logger.warning("%s: the converted network is not kept (%s)", folder, error)
    with TemporaryDirectory() as temporary:
        return _save(converted, Path(temporary), loaded, identity)


def _save(converted: Any, folder: Path, backbone: Backbone, identity: dict[str, Any]) -> Any:
    """Write a network that is true to its backbone, and return it as the next process will read it."""
    try:
        ov.save_model(converted, folder / _GRAPH, compress_to_fp16=False)
        network = _read(folder)
    except RuntimeError as error:
        raise ResourceError(
            f"{folder}: cannot be written ({last_line(error)}); free some space, or {WAY_OUT}"
        ) from error
    _check_conversion(network, backbone)
    contents = {"identity": identity, "sha256": _digests(folder)}
    (folder / _CONTENTS).write_text(json.dumps(contents, indent=1))
    return network


def _read(folder: Path) -> Any:
    return _core().read_model(folder / _GRAPH)


def _check_conversion(network: Any, backbone: Backbone) -> None:
    from transfercache.backbones.devices import pick_device
    from transfercache.backbones.engines import EagerEngine

    pixels = canary_pixels(backbone.preprocessing.crop)
    expected = EagerEngine(backbone, pick_device("cpu")).embed(pixels)
    found = _compile(network, pixels.shape, precision="f32")([pixels])[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        raise UsageError(
            f"{backbone.name}: as OpenVINO converts it, its embeddings are off by {error:.2g} of the largest feature; "
            f"{WAY_OUT}"
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


def last_line(error: Exception) -> str:
    """Return where OpenVINO says what went wrong."""
    return (str(error).splitlines() or [type(error).__name__])[-1]
