"""The cards that train-head and finetune leave beside their models, from real runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.train import train_head
from transfercache.files import sha256_file


def _card(model: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(model.with_name(f"{model.stem}.card.json").read_bytes())
    assert card["model_sha256"] == sha256_file(model)
    assert f"# {model.name}" in model.with_name(f"{model.stem}.card.md").read_text()
    return card


def _digest(photos: list[Path]) -> str:
    digests = sorted(hashlib.sha256(photo.read_bytes()).digest() for photo in photos)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _counted(card: dict[str, Any]) -> dict[str, dict[str, int]]:
    splits = card["data"]["splits"]
    return {split: {name: item["images"] for name, item in classes.items()} for split, classes in splits.items()}


def test_train_head__leaves_the_card_of_its_rows(extraction: Extraction, pets: Path, tmp_path: Path) -> None:
    result = train_head(extraction, C=1.0, calibrate=True, val_fraction=0.0, out=tmp_path / "head.safetensors")
    card = _card(tmp_path / "head.safetensors")
    assert (card["data"]["name"], card["reported"], card["n_train"]) == ("pets", None, 16)
    assert card["data"]["splits"] == {
        "train": {name: {"images": 8, "digest": _digest(sorted((pets / name).iterdir()))} for name in ("cat", "dog")}
    }
    assert result.linear_head is not None
    assert card["temperature"] == result.linear_head.temperature
    assert card["seconds"] > 0


def test_train_head__on_other_labels_and_views__counts_images_by_those_labels(pets: Path, tmp_path: Path) -> None:
    extraction = extract_features(
        pets, backbone="mobilenet_v3_small", weights="random", views=2, cache_dir=tmp_path / "cache"
    )
    (tmp_path / "fixes.csv").write_text("path,label\ncat/0.png,dog\n")
    before = train_head(extraction, C=1.0, out=tmp_path / "a.safetensors")
    after = train_head(extraction, C=1.0, labels=tmp_path / "fixes.csv", out=tmp_path / "b.safetensors")
    cards = [_card(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    sums = [
        {name: sum(classes.get(name, 0) for classes in _counted(card).values()) for name in ("cat", "dog")}
        for card in cards
    ]
    assert sums == [{"cat": 8, "dog": 8}, {"cat": 7, "dog": 9}]
    assert cards[0]["data"]["digest"] != cards[1]["data"]["digest"]
    for result, card in zip((before, after), cards, strict=True):
        assert result.reported is not None
        assert card["reported"] == result.reported.to_json()


def test_finetune__leaves_the_card_of_the_images_that_it_could_read(
    draw_photos: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(2)]
    data = draw_photos(tmp_path / "data", names)
    (data / "train/cat/bad.png").write_text("text")
    out = tmp_path / "net.safetensors"
    outcome = finetune(
        data, backbone="mobilenet_v3_small", weights="random", epochs=2, unfreeze="none", on_bad="skip", out=out
    )
    card = _card(out)
    assert _counted(card) == {"train": {"cat": 2, "dog": 2}, "val": {"cat": 2, "dog": 2}}
    assert card["data"]["splits"]["train"]["cat"]["digest"] == _digest([data / f"train/cat/{i}.png" for i in range(2)])
    assert (card["kind"], card["n_train"], card["predict"]) == (
        "fine-tuned network",
        4,
        "tlc predict net.safetensors images/",
    )
    assert card["epochs"] == json.loads(json.dumps([asdict(epoch) for epoch in outcome.epochs]))
    assert outcome.reported is not None
    assert card["reported"] == outcome.reported.to_json()
    assert [group["name"] for group in card["chosen"]["groups"]] == [group.name for group in outcome.groups]
