"""`tlc export`: a MODEL as a file that others load, compared with tlc's own logits before it is left behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfercache import config
from transfercache.arrays import Float32Array
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.choice import Choice, Engine
from transfercache.commands.inputs import BadImage, changed_words, log_skipped
from transfercache.commands.predict import embed_images
from transfercache.errors import ModelError, UsageError
from transfercache.extract.loop import Embedder
from transfercache.files import check_writable, replacing, sha256_file, write_atomic
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_images
from transfercache.models.exported import SideBySide, classifier_of, pick_format
from transfercache.models.head_file import Model, load_model
from transfercache.models.network import checked_engine, load_backbone_of
from transfercache.plain import fields_of
from transfercache.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from rich.console import RenderableType

# Of the logits: what is computed in another order differs by some 1e-6 of the largest, a wrong layer by far more.
_TOLERANCE = 1e-4
_TOLERANCE_OF_LARGEST = 1e-5

# The engine that all others are held to.
_EAGER = Choice("eager", "cpu", "fp32")


@dataclass(frozen=True, eq=False)
class Exported:
    """The file that was written, how its logits agree with tlc's, and what to know of it."""

    model: Path
    format: str
    out: Path
    metadata: dict[str, str]
    checked: int  # images that both saw, the four made ones among them
    difference: float  # the largest between any logit and tlc's own
    other_labels: int  # images whose most probable class is another one: ties within the difference
    notes: tuple[str, ...]
    bad: tuple[BadImage, ...]  # of --check
    data: str | None
    weights: str | None

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        moved = changed_words(weights=(self.weights, None))
        if self.data is not None:
            return ("tlc", "predict", str(self.model), self.data, *moved)
        kept = ("--format", self.format, "--out", str(self.out), *moved)
        return ("tlc", "export", str(self.model), *kept, "--check", "images/")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc export`."""
        return fields_of(self, without=("data",))

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from rich.text import Text

        checked = (
            f"on {self.checked} images its logits are within {self.difference:.2g} of tlc's, "
            f"and {self.other_labels} labels are others"
        )
        lines = (f"{self.out}: {self.metadata['network']}", checked, f"in: {self.metadata['input']}", *self.notes)
        return Text("\n".join(lines))


def export(
    model: str | Path,
    *,
    format: config.ExportFormat = config.EXPORT_FORMAT,
    out: Path | str | None = None,
    weights: str | None = None,
    check: str | Path | None = None,
) -> Exported:
    """Write a MODEL, its backbone and head in one, as a torchvision state_dict (.pth), safetensors or ONNX.

    The file is read back as its users will, and left behind only where its logits on four made images, and on those of
    the DATA `check`, are within 1e-4 of tlc's own (for logits above 10: within 1e-5 of the largest). It computes in
    float32, and the softmax of its logits is what `predict` gives. `out` is beside the model where None. A .pth holds
    tensors alone: class names and preprocessing are then in a .json beside it.

    Raises ModelError (also where the logits differ), WeightsError, ResourceError (a missing extra), UsageError for a
    format that this backbone does not have, DataError.
    """
    path, loaded = Path(model), load_model(Path(model))
    chosen = pick_format(format, backbone=loaded.head.spec.backbone)
    target = path.with_name(f"{path.stem}-exported{chosen.suffix}") if out is None else Path(out)
    if target.resolve() == path.resolve():
        raise UsageError(f"--out {target}: is the MODEL itself; name another file")
    check_writable(target)
    backbone = load_backbone_of(loaded, path, weights=weights).load()
    engine = checked_engine(loaded, path, backbone, choice=_EAGER)
    classifier = classifier_of(backbone, loaded.head)
    classifier.metadata["model_sha256"] = sha256_file(path)
    photos = None if check is None else _read(check)
    bad: list[BadImage] = []
    with replacing(target) as temporary:
        chosen.write(classifier, temporary)
        run = chosen.read(temporary, backbone.name, len(loaded.head.class_names))
        both = SideBySide(engine, loaded.head, run)
        logits = _logits(both, loaded, photos, bad)
        checked, difference, other_labels = _compare(logits, loaded, what=f"{path}: as {format}")
    if not chosen.holds_metadata:
        sidecar = target.with_name(f"{target.name}.json")
        write_atomic(sidecar, json.dumps(classifier.metadata, indent=1).encode())
    if photos is not None and bad:
        logger.warning("%d of %d images are unreadable; the others were compared", len(bad), photos.n_rows)
    return Exported(
        model=path,
        format=format,
        out=target,
        metadata=classifier.metadata,
        checked=checked,
        difference=difference,
        other_labels=other_labels,
        notes=_notes(loaded, has_sidecar=not chosen.holds_metadata, target=target),
        bad=tuple(bad),
        data=None if check is None else str(check),
        weights=weights,
    )


def _notes(model: Model, *, has_sidecar: bool, target: Path) -> tuple[str, ...]:
    notes = []
    compute, temperature = model.head.spec.compute, model.head.temperature
    if compute != "fp32":
        notes.append(f"computes in float32; the model was trained, and predict computes, in {compute}")
    if temperature != 1:
        notes.append(f"the softmax of its logits is calibrated: the temperature {temperature:.3g} is divided out")
    if has_sidecar:
        notes.append(f"class names and preprocessing: {target.name}.json")
    return tuple(notes)


def _read(data: str | Path) -> Manifest:
    manifest = read_images([str(data)])
    log_skipped(manifest)
    return hash_files(manifest, known={})


def _logits(
    both: Engine, model: Model, manifest: Manifest | None, bad: list[BadImage]
) -> Iterator[tuple[str, Float32Array]]:
    """Yield the name of each image, and its logits by tlc and by the file, float32 [2 C]; note the bad ones."""
    canaries = both.embed(canary_pixels(model.head.spec.preprocessing.crop))
    for number, row in enumerate(canaries):
        yield f"made image {number}", row
    if manifest is None:
        return
    bad.extend(BadImage(manifest.paths[row], reason) for row, reason in sorted(manifest.unreadable.items()))
    # Logits are no embeddings: none is to be refused for what float16 holds.
    spec = replace(model.head.spec, storage_dtype="float32")
    embedder = Embedder(manifest, spec, lambda: both, None, Stopwatch())
    views = [(row, 0) for row in np.flatnonzero(manifest.is_readable()).tolist()]
    with closing(embed_images(embedder, views, batch_size=config.EXTRACT_BATCH_SIZE)) as images:
        for row, outcome in images:
            if isinstance(outcome, str):
                bad.append(BadImage(manifest.paths[row], outcome))
            else:
                yield manifest.paths[row], outcome[0]


def _compare(images: Iterator[tuple[str, Float32Array]], model: Model, *, what: str) -> tuple[int, float, int]:
    """Return how many images there are, by how much their logits differ at most, and how many labels are others.

    Raises ModelError at the first image whose logits do not agree.
    """
    n_images = n_other_labels = 0
    largest = 0.0
    # The logit of a class without training rows is its bias, and the largest of all by far.
    is_trained = model.head.is_trained
    for name, row in images:
        own, exported = np.split(row, 2)
        difference = float(np.abs(exported - own).max())
        allowed = max(_TOLERANCE, _TOLERANCE_OF_LARGEST * float(np.abs(own[is_trained]).max()))
        if not difference <= allowed:
            raise ModelError(
                f"{what}, its logits differ from tlc's by {difference:.3g} on {name} (allowed: {allowed:.3g}), so no "
                "file is left; choose another --format"
            )
        n_images, largest = n_images + 1, max(largest, difference)
        n_other_labels += int(own.argmax() != exported.argmax())
    return n_images, largest, n_other_labels
