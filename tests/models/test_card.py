from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.files import sha256_file
from transfercache.models.card import CardData, card_paths, save_card
from transfercache.models.head_file import Model, load_model, save_model
from transfercache.spec import ExtractSpec
from transfercache.splits import Split
from transfercache.version import __version__

REPORTED = {
    "split": "val",
    "accuracy": 0.75,
    "interval": [0.301, 0.954],
    "n": 4,
    "log_loss": 0.5,
    "ece": 0.125,
    "per_class": [
        {"class": "ant", "n": 3, "n_train": 2, "recall": 2 / 3, "precision": 1.0},
        {"class": "bee\n[b]", "n": 1, "n_train": 1, "recall": 1.0, "precision": None},
    ],
}


def _data(order: list[int] | None = None) -> CardData:
    """Six images: three to train on, two reported, one without a label; then one that could not be read."""
    digests = np.zeros((7, 32), np.uint8)
    digests[:6, 0] = range(1, 7)
    labels = np.array([0, 1, 0, 0, 1, -1, 0])
    split = np.array([Split.TRAIN] * 3 + [Split.VAL] * 3 + [Split.TRAIN], np.uint8)
    rows = slice(None) if order is None else order
    return CardData("ants", digests[rows], labels[rows], split[rows])


@pytest.fixture
def reported(model: Model) -> Model:
    return replace(model, reported=REPORTED)


def _saved(model: Model, path: Path, **more: Any) -> dict[str, Any]:
    save_model(model, path)
    save_card(path, model, _data(), seconds=1.5, **more)
    card: dict[str, Any] = json.loads(card_paths(path)[0].read_bytes())
    return card


def test_card__says_what_the_model_is_and_what_it_was_trained_on(reported: Model, tmp_path: Path) -> None:
    path = tmp_path / "ants.safetensors"
    card = _saved(reported, path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ants.card.json", "ants.card.md", "ants.safetensors"]
    assert (card["model"], card["model_sha256"]) == ("ants.safetensors", sha256_file(path))
    assert (card["kind"], card["holds_backbone"]) == ("linear head on frozen embeddings", False)
    assert card["classes"] == list(reported.head.class_names)
    assert card["reported"] == REPORTED
    assert ExtractSpec.from_json(card["spec"]) == reported.head.spec
    assert (card["temperature"], card["n_train"], card["seconds"]) == (1.5, 12, 1.5)
    assert (card["solver"], card["chosen"]) == ("logistic", reported.head.chosen)
    assert card["versions"]["transfercache"] == __version__ == card["tlc_version"]
    digests = _data().digests
    assert card["data"]["splits"] == {
        "train": {
            "ant": {"images": 2, "digest": hashlib.sha256(digests[[0, 2]].tobytes()).hexdigest()},
            "bee\n[b]": {"images": 1, "digest": hashlib.sha256(digests[[1]].tobytes()).hexdigest()},
        },
        "val": {
            "ant": {"images": 1, "digest": hashlib.sha256(digests[[3]].tobytes()).hexdigest()},
            "bee\n[b]": {"images": 1, "digest": hashlib.sha256(digests[[4]].tobytes()).hexdigest()},
        },
    }


def test_data_digest__is_of_content_label_and_split_and_not_of_order() -> None:
    names = ("ant", "bee", "caf")
    digest = _data().to_json(names)["digest"]
    assert _data([6, 5, 4, 3, 2, 1, 0]).to_json(names)["digest"] == digest
    others = []
    for field, row, value in (("digests", 0, 9), ("labels", 0, 2), ("split", 4, Split.TEST)):
        data = _data()
        getattr(data, field)[row] = value
        others.append(data.to_json(names)["digest"])
    assert len({digest, *others}) == 4


def test_card__names_no_folder(reported: Model, weights_file: Path, tmp_path: Path) -> None:
    assert reported.weights_source["where"] == str(weights_file)
    card = _saved(reported, tmp_path / "ants.safetensors")
    assert card["weights"] == {"kind": "file", "where": "small.pth", "licence": "not known to tlc"}
    assert card["predict"] == "tlc predict ants.safetensors images/ --weights small.pth"
    for path in card_paths(tmp_path / "ants.safetensors"):
        assert str(weights_file.parent) not in path.read_text()
        assert str(tmp_path) not in path.read_text()


def test_card__of_a_fine_tuned_model__has_its_curve_and_needs_no_weights(finetuned: Model, tmp_path: Path) -> None:
    epochs = [{"epoch": 1, "train_loss": 0.7}, {"epoch": 2, "train_loss": 0.5}]
    card = _saved(replace(finetuned, reported=None), tmp_path / "ants", epochs=epochs)
    assert (card["kind"], card["holds_backbone"]) == ("fine-tuned network", True)
    assert card["epochs"] == epochs
    assert card["predict"] == "tlc predict ants images/"


def test_markdown__has_the_figures_and_keeps_its_tables(reported: Model, tmp_path: Path) -> None:
    _saved(reported, tmp_path / "ants.safetensors")
    text = card_paths(tmp_path / "ants.safetensors")[1].read_text()
    assert "Accuracy 0.750 (95 % interval 0.301 to 0.954) on the 4 images of\nits val split" in text
    assert "| ant | 2 | 3 | 0.667 | 1.000 |\n| bee\\n[b] | 1 | 1 | 1.000 | - |\n" in text
    assert "| train | ant | 2 | " in text
    assert "temperature 1.5\n" in text
    assert "--tta" not in text
    # Names that hold newlines and bytes that are not UTF-8 are written out.
    assert "It tells apart: ant, bee\\n[b], caf\\udce9." in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5, 6}


def test_card__of_figures_over_views__says_so(reported: Model, tmp_path: Path) -> None:
    path = tmp_path / "ants.safetensors"
    assert _saved(reported, path)["tta"] is False
    assert _saved(reported, path, tta=True)["tta"] is True
    text = card_paths(path)[1].read_text()
    assert "its val split, by the mean of each image's views (--tta), log loss 0.500" in text


def test_card__of_a_name_that_is_not_utf8(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9\n.safetensors"
    card = _saved(replace(model, reported=None), path)
    assert card["model"] == path.name
    assert card_paths(path)[1].read_text().startswith("# caf\\udce9\\n.safetensors\n")


def test_markdown__of_a_model_without_figures(model: Model, tmp_path: Path) -> None:
    _saved(replace(model, reported=None), tmp_path / "ants.safetensors")
    text = card_paths(tmp_path / "ants.safetensors")[1].read_text()
    assert "Not known: the data had no labelled image outside its training split." in text


def test_card__that_cannot_be_written__leaves_the_model_and_says_so(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ants.safetensors"
    card_paths(path)[0].mkdir()
    save_model(model, path)
    with caplog.at_level(logging.WARNING):
        save_card(path, model, _data(), seconds=1.0)
    assert load_model(path).head.class_names == model.head.class_names
    assert caplog.messages == [
        f"the model is written, but not its card: {card_paths(path)[0]}: cannot be written (Is a directory); "
        "choose another path"
    ]
