"""The card of a MODEL, as JSON and Markdown beside it: what it tells apart, what it was trained on, and how good it is.

After Mitchell et al. 2019, "Model Cards for Model Reporting", doi:10.1145/3287560.3287596. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.environment import describe_environment
from transfercache.errors import ResourceError
from transfercache.files import sha256_bytes, sha256_file, write_atomic
from transfercache.models.head_file import Model
from transfercache.splits import SPLIT_NAMES
from transfercache.text import name_flag, name_value, one_line
from transfercache.version import __version__

CARD_SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CardData:
    """The images behind a model, one row each; those without a label, a split or a digest are not counted."""

    name: str
    digests: npt.NDArray[np.uint8]  # uint8 [N, 32], SHA-256 of the file's bytes
    labels: npt.NDArray[np.int64]  # int64 [N], into the model's classes, -1: none
    split: npt.NDArray[np.uint8]  # uint8 [N], of splits.Split

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return images and digest by split and class, and one digest of all that."""
        splits = {name: self._classes(code, class_names) for name, code in SPLIT_NAMES.items()}
        splits = {name: classes for name, classes in splits.items() if classes}
        text = json.dumps(splits, sort_keys=True, separators=(",", ":"))
        return {"name": self.name, "digest": sha256_bytes(text.encode()), "splits": splits}

    def _classes(self, split: int, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
        is_counted = (self.split == split) & self.digests.any(axis=1)
        found = {}
        for label in np.unique(self.labels[is_counted & (self.labels >= 0)]).tolist():
            rows = self.digests[is_counted & (self.labels == label)]
            # Sorted, so that names and order of the files do not matter.
            digest = hashlib.sha256(b"".join(sorted(row.tobytes() for row in rows)))
            found[class_names[label]] = {"images": len(rows), "digest": digest.hexdigest()}
        return found


def card_paths(model: Path) -> tuple[Path, Path]:
    """Return where the cards of a MODEL lie, as JSON and as Markdown."""
    name = model.name.removesuffix(".safetensors")
    return model.with_name(f"{name}.card.json"), model.with_name(f"{name}.card.md")


def save_card(
    path: Path,
    model: Model,
    data: CardData,
    *,
    seconds: float,
    epochs: Sequence[Mapping[str, Any]] = (),
    trials: Sequence[Mapping[str, Any]] = (),
    tta: bool = False,
) -> None:
    """Write the cards of the model that was saved at `path`: after it, so that whatever becomes of them, it is there.

    `seconds` is what training took, `epochs` the curve of a fine-tuned network and `trials` what was tried before it on
    held-out training images, in JSON's types; with `tta` the figures are of the mean of each image's views. No folder
    stands in a card: it is made to be given away. One that cannot be written is a warning.
    """
    made = {"seconds": round(seconds, 3), "epochs": list(epochs), "trials": list(trials), "tta": tta}
    card = {**_describe(path, model), "data": data.to_json(model.head.class_names), **made}
    as_json, as_markdown = card_paths(path)
    try:
        write_atomic(as_json, json.dumps(card, indent=1, allow_nan=False).encode())
        write_atomic(as_markdown, _markdown(card).encode())
    except ResourceError as error:
        logger.warning("the model is written, but not its card: %s", error)


def _describe(path: Path, model: Model) -> dict[str, Any]:
    head = model.head
    source = dict(model.weights_source)
    words = ["tlc", "predict", path.name, "images/"]
    if source.get("kind") == "file":
        source["where"] = Path(source["where"]).name
        words += [] if model.is_finetuned or model.bundled_tensors else ["--weights", source["where"]]
    return {
        "schema_version": CARD_SCHEMA_VERSION,
        "tlc_version": __version__,
        "model": path.name,
        "model_sha256": sha256_file(path),
        "kind": "fine-tuned network" if model.is_finetuned else "linear head on frozen embeddings",
        "holds_backbone": bool(model.is_finetuned or model.bundled_tensors),
        "classes": list(head.class_names),
        "reported": model.reported,
        "solver": head.solver,
        "chosen": head.chosen,
        "n_train": head.n_train,
        "temperature": head.temperature,
        "spec": head.spec.to_json(),
        "weights": source,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_environment(),
        "predict": shlex.join(words),
    }


def _markdown(card: Mapping[str, Any]) -> str:
    spec, weights, data, machine = card["spec"], card["weights"], card["data"], card["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    names = ", ".join(map(_cell, card["classes"]))
    calibration = "not calibrated" if card["temperature"] == 1 else f"temperature {card['temperature']:.4g}"
    return "\n".join(
        [
            f"# {_cell(card['model'])}",
            "",
            f"A {card['kind']} ({spec['backbone']}). It tells apart: {names}. Every image is given one of these",
            "classes, also one that shows none of them.",
            "",
            f"    {one_line(card['predict'])}",
            "",
            "## How good it is",
            *_figures(card["reported"], tta=card["tta"]),
            "",
            "## What it was trained on",
            f"`{data['name']}`, images by split and class (digest of all: `{data['digest'][:16]}`):",
            "",
            *_table(("split", "class", "images", "digest"), _data_rows(data["splits"])),
            "",
            *_tried(card["trials"]),
            "## How it was made",
            f"- solver {card['solver']}: `{json.dumps(card['chosen'])}`; {calibration}",
            f"- backbone {spec['backbone']}, computed in {spec['compute']}; weights digest `{spec['weights_digest']}`",
            f"- weights from {_cell(weights.get('where', 'an unknown place'))} ({weights.get('kind', 'unknown')}); "
            f"licence: {_cell(weights.get('licence', 'not known'))}",
            f"- {card['date']}, {card['seconds']:.1f} s on {machine['processor']}, {machine['cores']} cores",
            f"- tlc {card['tlc_version']}; {versions}",
            f"- SHA-256 of the model: `{card['model_sha256']}`",
            "",
        ]
    )


def _figures(reported: Mapping[str, Any] | None, *, tta: bool) -> list[str]:
    if reported is None:
        return ["Not known: the data had no labelled image outside its training split."]
    low, high = reported["interval"]
    views = ", by the mean of each image's views (--tta)" if tta else ""
    rows = [
        (item["class"], item["n_train"], item["n"], _share(item["recall"]), _share(item["precision"]))
        for item in reported["per_class"]
    ]
    return [
        f"Accuracy {reported['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}) on the {reported['n']} images of",
        f"its {reported['split']} split{views}, log loss {reported['log_loss']:.3f}, calibration error "
        f"{reported['ece']:.3f}.",
        "The interval is about images like these; nothing is known of others.",
        "",
        *_table(("class", "training images", "reported images", "recall", "precision"), rows),
    ]


def _tried(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    if not trials:
        return []
    rows = [
        (
            "; ".join(f"`--{name_flag(name)} {name_value(value)}`" for name, value in trial["values"].items()),
            trial["failure"] or f"{trial['held_out_log_loss']:.4f}",
            _share(trial["held_out_accuracy"]),
            "chosen" if trial["is_chosen"] else "",
        )
        for trial in trials
    ]
    return [
        "## What was tried",
        f"Trained without {trials[0]['n_held_out']} of the training images, and judged by the log loss on those. The",
        "images of the figures above had no part in it.",
        "",
        *_table(("options", "held-out log loss", "held-out accuracy", ""), rows),
        "",
    ]


def _data_rows(splits: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (split, name, item["images"], item["digest"][:16])
        for split, classes in splits.items()
        for name, item in classes.items()
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(str(cell)) for cell in row) + " |" for row in cells]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """Return text that neither ends a line nor a cell."""
    return one_line(text).replace("|", "\\|")
