"""A MODEL as one network in the formats of others: written, and read back as its users will."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import nn

from transfercache.arrays import Float32Array
from transfercache.backbones.choice import Engine
from transfercache.backbones.engines import full_float32, normalise
from transfercache.backbones.registry import Backbone, network_with_head, plain_call, plain_network
from transfercache.backbones.torchvision_adapter import torchvision_names
from transfercache.backbones.weights import weights_digest
from transfercache.environment import installed_versions
from transfercache.errors import ResourceError, UsageError
from transfercache.heads.linear_head import LinearHead
from transfercache.spec import Preprocessing
from transfercache.version import __version__

#: ONNX's operators as of 2022, the ones that torch's exporter writes without converting them; read by all since.
OPSET = 18
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_INPUT, _ONNX_OUTPUT = "images", "logits"
# Of protobuf, in which an ONNX file is one message.
_MAX_ONNX_BYTES = (1 << 31) - (1 << 20)

#: From images, float32 [B, 3, crop, crop], to logits, float32 [B, C].
Run = Callable[[Float32Array], Float32Array]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A backbone and its head as one network, in float32 and eval mode, on the CPU.

    It maps normalised images, float32 [B, 3, crop, crop], to logits [B, C] whose softmax is what `tlc predict` gives:
    the head's temperature is divided out of its weights.
    """

    network: nn.Module
    backbone: str
    preprocessing: Preprocessing
    metadata: dict[str, str]  # what a user of the file has to know, in JSON where it is not plain text


@dataclass(frozen=True)
class Format:
    """How a classifier is written to a path, and what a user makes of that file."""

    suffix: str
    write: Callable[[Classifier, Path], None]
    read: Callable[[Path, str, int], Run]  # of the path, the backbone's name and C
    holds_metadata: bool


def classifier_of(backbone: Backbone, head: LinearHead) -> Classifier:
    """Put `head` into its backbone, where the library's own classifier was."""
    network = network_with_head(backbone, len(head.class_names), seed=0)
    folded = {"weight": head.weight / head.temperatures[:, None], "bias": head.bias / head.temperatures}
    state = {name: torch.from_numpy(tensor) for name, tensor in folded.items()}
    network.get_submodule(backbone.head_path).load_state_dict(state)
    spec, crop = head.spec.to_json(), head.spec.preprocessing.crop
    metadata = {
        "tlc_version": __version__,
        "network": plain_call(head.spec.backbone, len(head.class_names)),
        "class_names": json.dumps(head.class_names),
        "input": f"float32 [batch, 3, {crop}, {crop}], RGB, (value / 255 - mean) / std",
        "preprocessing": json.dumps(spec["preprocessing"]),
        "output": "logits [batch, classes]; their softmax is what tlc predict gives, the temperature being divided out",
        "temperature": repr(head.temperature),
        "weights_digest": weights_digest(network.state_dict()),
        "spec": json.dumps(spec),
        "versions": json.dumps(installed_versions()),
    }
    return Classifier(network, head.spec.backbone, head.spec.preprocessing, metadata)


@dataclass(frozen=True, eq=False)
class SideBySide:
    """An engine whose rows are tlc's own logits over the temperature and then those of `run`."""

    engine: Engine
    head: LinearHead
    run: Run

    def embed(self, pixels: npt.NDArray[np.uint8]) -> Float32Array:
        """Return float32 [B, 2 C] for uint8 [B, H, W, 3]."""
        own = self.head.logits(self.engine.embed(pixels)) / self.head.temperatures
        images = normalise(torch.from_numpy(pixels), self.head.spec.preprocessing).contiguous().numpy()
        return np.concatenate([own, self.run(images)], axis=1)


def pick_format(name: str, *, backbone: str) -> Format:
    """Return the format of this name for a backbone.

    Raises UsageError for an unknown one, or one that the backbone does not have, ResourceError for a missing extra.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    if name == "torchvision" and backbone not in torchvision_names():
        raise UsageError(
            f"--format torchvision: {backbone} is timm's, and torchvision has no such network; "
            "pass --format safetensors, which loads into timm's, or onnx"
        )
    missing = [package for package in _ONNX_PACKAGES if name == "onnx" and find_spec(package) is None]
    if missing:
        raise ResourceError(
            f"--format onnx: {', '.join(missing)} is not installed; install it with: pip install 'transfercache[onnx]'"
        )
    return FORMATS[name]


def _write_torchvision(classifier: Classifier, path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch does not say what the system refused
        torch.save(classifier.network.state_dict(), file)


def _write_safetensors(classifier: Classifier, path: Path) -> None:
    # Copies: a file holds no two names of one tensor's memory.
    state = {name: tensor.contiguous().clone() for name, tensor in classifier.network.state_dict().items()}
    # Not save_file: it makes a file that only its owner may read, and hides what the system refused.
    path.write_bytes(safetensors.torch.save(state, classifier.metadata))


def _write_onnx(classifier: Classifier, path: Path) -> None:
    state, crop = classifier.network.state_dict(), classifier.preprocessing.crop
    if sum(tensor.nbytes for tensor in state.values()) > _MAX_ONNX_BYTES:
        raise UsageError(
            f"{classifier.backbone}: above 2 GiB, more than one ONNX file holds; pass --format safetensors"
        )
    try:
        program = torch.onnx.export(
            classifier.network,
            (torch.zeros(2, 3, crop, crop),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[_ONNX_INPUT],
            output_names=[_ONNX_OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{classifier.backbone}: torch cannot export it to ONNX ({reason}); pass --format safetensors"
        ) from error
    assert program is not None  # dynamo's exporter returns one
    program.model.metadata_props.update(classifier.metadata)
    program.save(path, external_data=False)


def _read_pth(path: Path, backbone: str, n_classes: int) -> Run:
    return _run_of(torch.load(path, map_location="cpu", weights_only=True), backbone, n_classes)


def _read_safetensors(path: Path, backbone: str, n_classes: int) -> Run:
    return _run_of(safetensors.torch.load_file(path), backbone, n_classes)


def _run_of(state: Mapping[str, torch.Tensor], backbone: str, n_classes: int) -> Run:
    network = plain_network(backbone, n_classes)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        call = plain_call(backbone, n_classes)
        raise UsageError(f"the tensors do not load into {call} ({reason}); pass --format onnx") from error

    def run(images: Float32Array) -> Float32Array:
        with torch.inference_mode(), full_float32():
            logits: Float32Array = network(torch.from_numpy(images)).numpy()
        return logits

    return run


def _read_onnx(path: Path, backbone: str, n_classes: int) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Float32Array) -> Float32Array:
        logits: Float32Array = session.run([_ONNX_OUTPUT], {_ONNX_INPUT: images})[0]
        return logits

    return run


FORMATS = {
    "torchvision": Format(".pth", _write_torchvision, _read_pth, holds_metadata=False),
    "safetensors": Format(".safetensors", _write_safetensors, _read_safetensors, holds_metadata=True),
    "onnx": Format(".onnx", _write_onnx, _read_onnx, holds_metadata=True),
}
