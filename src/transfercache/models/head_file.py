"""A MODEL on disk: one safetensors file with the head, the canary logits and JSON metadata. Torch-free.

Tensors, all float32 unless the backbone's own are of another dtype:
  head.weight [C, D]   head.bias [C]   canary_logits [4, C]
  backbone.<name>      a fine-tuned backbone's tensors; absent for a head on frozen embeddings
  bundled.<name>       the frozen backbone's tensors, where asked for (--bundle)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from transfercache.arrays import Float32Array
from transfercache.errors import ModelError
from transfercache.files import check_readable, check_writable, write_atomic
from transfercache.heads.linear_head import LinearHead
from transfercache.spec import ExtractSpec
from transfercache.strict_json import each, parse, take
from transfercache.version import __version__

MODEL_SCHEMA_VERSION = 1
_METADATA_KEY = "tlc"
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("schema_version", "n_train"), int),
    **dict.fromkeys(("tlc_version", "solver"), str),
    **dict.fromkeys(("spec", "chosen", "weights_source"), dict),
    "class_names": list,
    "temperature": float,
    "reported": (dict, type(None)),
}
_BACKBONE_PREFIX = "backbone."
_BUNDLED_PREFIX = "bundled."
# A thousand classes with their figures take some hundred kilobytes.
_MAX_METADATA_BYTES = 64 << 20
# Of what the logits differ by from image to image, by precision: machines and engines differ by less (two that compute
# in bfloat16 by 2e-2, measured), a wrong network by far more.
CANARY_TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}
# Of the logits themselves: a bias in float32 rounds away what is smaller.
CANARY_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Model:
    """A head with what prediction needs: its spec, where the backbone's weights came from, and canary logits."""

    head: LinearHead
    canary_logits: Float32Array  # float32 [4, C]: the logits of `backbones.canaries.canary_pixels`
    weights_source: dict[str, str]
    reported: dict[str, Any] | None = None
    backbone_tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # not empty: fine-tuned
    bundled_tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # of the spec's frozen backbone

    @property
    def is_finetuned(self) -> bool:
        """Whether the file holds a backbone of its own, so that cached embeddings do not fit it."""
        return bool(self.backbone_tensors)


def save_model(model: Model, path: Path) -> None:
    """Write `model` to `path`, replacing it atomically; missing parent folders are made."""
    head = model.head
    tensors: dict[str, npt.NDArray[Any]] = {
        "head.weight": head.weight,
        "head.bias": head.bias,
        "canary_logits": model.canary_logits,
        **{_BACKBONE_PREFIX + name: tensor for name, tensor in model.backbone_tensors.items()},
        **{_BUNDLED_PREFIX + name: tensor for name, tensor in model.bundled_tensors.items()},
    }
    description = {
        "schema_version": MODEL_SCHEMA_VERSION,
        "tlc_version": __version__,
        "class_names": list(head.class_names),
        "spec": head.spec.to_json(),
        "solver": head.solver,
        "chosen": head.chosen,
        "n_train": head.n_train,
        "temperature": head.temperature,
        "weights_source": model.weights_source,
        "reported": model.reported,
    }
    metadata = {_METADATA_KEY: json.dumps(description, allow_nan=False)}
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    check_writable(path)
    write_atomic(path, safetensors.numpy.save(contiguous, metadata))


def load_model(path: Path) -> Model:
    """Read and validate a MODEL; raises ModelError naming the file and what is wrong with it, or ResourceError."""
    if not path.is_file():
        raise ModelError(f"{path}: no such model file; train-head and finetune write one (--out)")
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: not a model of tlc ({error})") from error
    try:
        return _checked_model(tensors, _parse(metadata))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a model of this tlc ({error}); train it again") from error


def check_canaries(path: Path, model: Model, embeddings: Float32Array) -> None:
    """Compare the logits of fresh canary embeddings, float32 [4, D], with those kept in the file.

    Raises ModelError where they differ, or where the head does not take embeddings of this length.
    """
    if embeddings.shape[1] != model.head.dim:
        raise ModelError(
            f"{path}: its head takes {model.head.dim} features, but its backbone gives {embeddings.shape[1]}; "
            "train it again"
        )
    # The logit of a class without training rows is its bias whatever the network, and the largest of all by far.
    is_trained = model.head.is_trained
    kept = model.canary_logits[:, is_trained]
    spread = float(np.ptp(kept, axis=0).max(initial=0.0))
    largest = float(np.abs(kept).max(initial=0.0))
    difference = float(np.abs(model.head.logits(embeddings)[:, is_trained] - kept).max(initial=0.0))
    if not difference <= CANARY_TOLERANCE[model.head.spec.compute] * spread + CANARY_ROUNDING * largest:
        raise ModelError(
            f"{path}: on its own test images this model's logits differ from those it was saved with by "
            f"{difference:.3g}; the backbone here is not the one it was trained on"
        )


def _parse(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(_METADATA_KEY)
    if text is None:
        raise ValueError("it has no tlc metadata")
    if len(text) > _MAX_METADATA_BYTES:
        raise ValueError("its metadata is too large")
    description = parse(text.encode())
    version = description.get("schema_version") if isinstance(description, dict) else None
    if type(version) is int and version != MODEL_SCHEMA_VERSION:
        raise ValueError(f"schema {version}, this tlc reads {MODEL_SCHEMA_VERSION}")
    return take(description, "its metadata", _TYPES)


def _checked_model(tensors: Mapping[str, npt.NDArray[Any]], description: Mapping[str, Any]) -> Model:
    class_names = tuple(each(description["class_names"], str, "class_names"))
    canary = tensors["canary_logits"]
    if canary.shape != (4, len(class_names)) or canary.dtype != np.float32 or not np.isfinite(canary).all():
        raise ValueError(f"canary_logits must be finite float32 [4, {len(class_names)}]")
    each(list(description["weights_source"].values()), str, "weights_source")
    # LinearHead checks its own parts: shapes, dtypes, finite values, different names.
    head = LinearHead(
        weight=tensors["head.weight"],
        bias=tensors["head.bias"],
        class_names=class_names,
        spec=ExtractSpec.from_json(description["spec"]),
        **{name: description[name] for name in ("solver", "chosen", "n_train", "temperature")},
    )
    return Model(
        head=head,
        canary_logits=canary,
        weights_source=description["weights_source"],
        reported=description["reported"],
        backbone_tensors=_under(_BACKBONE_PREFIX, tensors),
        bundled_tensors=_under(_BUNDLED_PREFIX, tensors),
    )


def _under(prefix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
