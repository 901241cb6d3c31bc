"""What an embedding depends on besides the image's bytes: `Preprocessing`, `ExtractSpec` and their digest."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, get_args

from transfercache import config
from transfercache.strict_json import each, take

SCHEMA_VERSION = 1

#: What the network computes in: float32, or half precision with sums in float32.
COMPUTES = ("fp32", "bf16", "fp16")

#: View 0 is the eval transform, view 1 its mirror image, the rest are drawn from the training augmentation.
VIEW_POLICY = "eval,mirror,augment/1"

#: The boundary of an embedding: the input of the last nn.Linear that runs.
POOLED = "pooled"
_STAGE_BOUNDARY = re.compile(r"\S+ (\d+(?:x\d+)*)")

#: What decodes and resizes; what each does to the pixels is in docs/images.md.
DECODERS: tuple[str, ...] = get_args(config.Decode)


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the network's input; two equal values give equal pixels.

    `resize` is the length in pixels that the shorter side is brought to, `crop` the side of the centred square cut
    from it. `mean` and `std` are per RGB channel on values in [0, 1].
    """

    resize: int
    crop: int
    interpolation: str  # bilinear | bicubic
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True
    colour: str = "rgb,grey16-scaled"
    exif: str = "applied"
    decoder: str = "pillow"  # one of DECODERS

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 4096 or not 0 < self.resize <= 4096:
            raise ValueError(f"resize {self.resize} and crop {self.crop} must lie between 1 and 4096 pixels")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation {self.interpolation!r} is neither bilinear nor bicubic")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder {self.decoder!r} is none of {', '.join(DECODERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError("mean and std must be three finite numbers each")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")


@dataclass(frozen=True)
class ExtractSpec:
    """The identity of a cache's rows, beside each image's content digest and view.

    Not in it, because they are provenance held to a parity test: device, engine, batch size, versions.
    """

    backbone: str
    weights_digest: str  # 64 hex digits, see backbones/weights.py
    boundary: str  # POOLED, or a stage's end with the shape of its activations, see `stage_boundary`
    preprocessing: Preprocessing
    compute: str = "fp32"
    storage_dtype: str = "float32"
    view_policy: str = VIEW_POLICY
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if len(self.weights_digest) != 64 or set(self.weights_digest) - set("0123456789abcdef"):
            raise ValueError("weights_digest must be 64 lower-case hex digits")
        if self.compute not in COMPUTES:
            raise ValueError(f"compute {self.compute!r} is none of {', '.join(COMPUTES)}")

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """The shape of the activations that a row holds in row-major order, as (C, H, W); None for an embedding."""
        match = _STAGE_BOUNDARY.fullmatch(self.boundary)
        return None if match is None else tuple(map(int, match[1].split("x")))

    def digest(self) -> str:
        """Return 64 hex digits: SHA-256 of the canonical JSON (sorted keys, no spaces)."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists, as they stand in the catalogue and in a MODEL."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ExtractSpec:
        """Build a spec from untrusted JSON; raises ValueError naming the first field that is wrong."""
        values = take(value, "ExtractSpec", _SPEC_TYPES)
        preprocessing = take(values["preprocessing"], "Preprocessing", _PREPROCESSING_TYPES)
        for name in ("mean", "std"):
            preprocessing[name] = tuple(map(float, each(preprocessing[name], (int, float), name)))
        return cls(**{**values, "preprocessing": Preprocessing(**preprocessing)})


def stage_boundary(stage: str, shape: tuple[int, ...]) -> str:
    """Return the boundary where a stage ends, such as "layer3 256x14x14"."""
    return f"{stage} {'x'.join(map(str, shape))}"


_SPEC_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("backbone", "weights_digest", "boundary", "compute", "storage_dtype", "view_policy"), str),
    "preprocessing": dict,
    "schema_version": int,
}
_PREPROCESSING_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("resize", "crop"), int),
    **dict.fromkeys(("interpolation", "colour", "exif", "decoder"), str),
    **dict.fromkeys(("mean", "std"), (list, tuple)),
    "antialias": bool,
}
