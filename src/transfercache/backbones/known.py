"""What a backbone is, told from a record of the time it was last loaded: torch takes seconds to import. Torch-free.

A record is kept under the user's cache folder. It says which weights file, by its SHA-256, gave which digest of weights
and which preprocessing by the installed versions; that file is hashed whenever the record is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfercache.backbones.available import DEFAULT, RANDOM
from transfercache.environment import installed_versions, tlc_folder
from transfercache.errors import ResourceError, WeightsError
from transfercache.files import check_readable, sha256_file, write_atomic
from transfercache.spec import POOLED, ExtractSpec, Preprocessing
from transfercache.strict_json import parse, take
from transfercache.version import __version__

if TYPE_CHECKING:
    from transfercache.backbones.registry import Backbone

logger = logging.getLogger(__name__)

# Those that decide what a name builds, and what its published weights are.
_MAKERS = ("torch", "torchvision", "timm")
# They move the place of published weights.
_PLACES = ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "dim": int,
    "spec": dict,
    "weights_source": dict,
    "file": (str, type(None)),
    "sha256": (str, type(None)),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenBackbone(ABC):
    """What an extraction needs to know of a backbone; `load` brings the network itself."""

    name: str
    dim: int  # D
    boundary: str = POOLED
    preprocessing: Preprocessing
    weights_digest: str  # 64 hex digits
    weights_source: dict[str, str]  # kind: default | file | random | package | hub; where; licence

    @abstractmethod
    def load(self) -> Backbone:
        """Return the network with its weights; raises what `load_backbone` does."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KnownBackbone(FrozenBackbone):
    """A backbone that was loaded before, from weights that are still the same bytes."""

    weights: str  # as `load_backbone` takes it

    def load(self) -> Backbone:
        """Return the network itself; raises WeightsError where its weights have changed meanwhile."""
        from transfercache.backbones.registry import load_backbone

        return load_backbone(self.name, weights=self.weights, expected_digest=self.weights_digest)


def find_backbone(name: str, *, weights: str = DEFAULT, expected_digest: str | None = None) -> FrozenBackbone:
    """Return what is on record of a backbone with these weights; where nothing is, load it and keep a record.

    Raises what `load_backbone` does.
    """
    given = _given_file(weights)
    digest = None if given is None else sha256_file(given)
    path = _record_path(name, digest or weights)
    known = _read_record(path, weights=weights, given=given)
    if known is not None and expected_digest in (None, known.weights_digest):
        return known
    from transfercache.backbones.registry import load_backbone

    loaded = load_backbone(name, weights=weights, expected_digest=expected_digest)
    _keep_record(path, loaded, digest=digest)
    return loaded


def _given_file(weights: str) -> Path | None:
    """Return the file that the user names, where there is one; that there is none is for the loader to say."""
    path = Path(weights).expanduser().absolute()
    if weights in (DEFAULT, RANDOM) or not path.is_file():
        return None
    check_readable(path)
    return path


def _record_path(name: str, weights: str) -> Path:
    versions = installed_versions()
    identity = {
        "backbone": name,
        "weights": weights,  # DEFAULT, random, or the SHA-256 of a file
        # tlc too: preprocessing and digests are by its own code.
        "versions": {"tlc": __version__, **{maker: versions[maker] for maker in _MAKERS if maker in versions}},
        "places": {place: os.environ[place] for place in _PLACES if place in os.environ},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return tlc_folder() / "backbones" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{digest[:16]}.json"


def _read_record(path: Path, *, weights: str, given: Path | None) -> KnownBackbone | None:
    """Return what a record says, or None where there is none, or its weights file is not what it was."""
    try:
        record = take(parse(path.read_bytes()), "the record", _FIELDS)
        spec = ExtractSpec.from_json(record["spec"])
        if given is None and record["file"] is not None and sha256_file(Path(record["file"])) != record["sha256"]:
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: not a record of a backbone (%s); it is loaded, and recorded again", path, error)
        return None
    source = record["weights_source"]
    return KnownBackbone(
        name=spec.backbone,
        dim=record["dim"],
        boundary=spec.boundary,
        preprocessing=spec.preprocessing,
        weights_digest=spec.weights_digest,
        weights_source=source if given is None else {**source, "where": str(given)},
        weights=weights,
    )


def _keep_record(path: Path, loaded: Backbone, *, digest: str | None) -> None:
    """Record what was loaded, unless its weights come from no file, or from one that changed while it was read."""
    file = loaded.weights_file
    if file is None and loaded.weights_source["kind"] != RANDOM:
        return
    found = None if file is None else sha256_file(file)
    if digest not in (None, found):
        raise WeightsError(f"{file}: it changed while it was being read; run the same command again")
    spec = ExtractSpec(loaded.name, loaded.weights_digest, loaded.boundary, loaded.preprocessing)
    record: dict[str, Any] = {
        "dim": loaded.dim,
        "spec": asdict(spec),
        "weights_source": loaded.weights_source,
        "file": None if file is None else str(file),
        "sha256": found,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record).encode())
    except (OSError, ResourceError) as error:
        logger.warning("%s: cannot be written (%s); the next run will load torch and the backbone again", path, error)
