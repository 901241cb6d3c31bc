from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from transfercache.backbones import registry
from transfercache.backbones.known import FrozenBackbone, KnownBackbone, find_backbone
from transfercache.backbones.registry import Backbone
from transfercache.errors import WeightsError


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records are kept, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    return tmp_path / "kept" / "transfercache" / "backbones"


def described(backbone: FrozenBackbone) -> tuple[object, ...]:
    return (
        backbone.name,
        backbone.dim,
        backbone.boundary,
        backbone.preprocessing,
        backbone.weights_digest,
        dict(backbone.weights_source),
    )


def refuse(*_: object, **__: object) -> Backbone:
    raise AssertionError("loaded again")


def test_known__says_what_loading_did(resnet18_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_backbone("resnet18", weights=str(resnet18_file))
    assert isinstance(first, Backbone)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_backbone", refuse)
        again = find_backbone("resnet18", weights=str(resnet18_file))
    assert isinstance(again, KnownBackbone)
    assert described(again) == described(first)
    loaded = again.load()
    for name, tensor in loaded.network.state_dict().items():
        torch.testing.assert_close(tensor, first.network.state_dict()[name], rtol=0, atol=0)


def test_known__follows_the_bytes__not_the_name(resnet18_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_backbone("resnet18", weights=str(resnet18_file))
    moved = resnet18_file.with_name("moved.pth")
    resnet18_file.rename(moved)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_backbone", refuse)
        assert find_backbone("resnet18", weights=str(moved)).weights_source["where"] == str(moved)
    state = torch.load(moved, weights_only=True)
    state["conv1.weight"] += 1
    torch.save(state, moved)
    changed = find_backbone("resnet18", weights=str(moved))
    assert isinstance(changed, Backbone)


def test_known__of_random_weights_and_other_networks__are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_backbone("resnet18", weights="random")
    other = find_backbone("mobilenet_v3_small", weights="random")
    monkeypatch.setattr(registry, "load_backbone", refuse)
    assert described(find_backbone("resnet18", weights="random")) == described(first)
    assert described(find_backbone("mobilenet_v3_small", weights="random")) == described(other)


def test_known__by_another_tlc__is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    find_backbone("resnet18", weights="random")
    monkeypatch.setattr("transfercache.backbones.known.__version__", "0.0.9")
    assert isinstance(find_backbone("resnet18", weights="random"), Backbone)
    assert isinstance(find_backbone("resnet18", weights="random"), KnownBackbone)


def test_known__of_another_digest_than_expected__is_refused_as_loading_does(resnet18_file: Path) -> None:
    find_backbone("resnet18", weights=str(resnet18_file))
    with pytest.raises(WeightsError, match="not the expected 0000"):
        find_backbone("resnet18", weights=str(resnet18_file), expected_digest="0" * 64)


def test_known__whose_file_is_gone__says_what_loading_does(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        find_backbone("resnet18", weights=str(tmp_path / "gone.pth"))


@pytest.mark.parametrize("damage", ["torn", "no digest", "more"])
def test_record__that_is_damaged__is_named_and_made_again(
    damage: str, records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = find_backbone("resnet18", weights="random")
    (path,) = records.iterdir()
    whole = path.read_bytes()
    record = json.loads(whole)
    if damage == "no digest":
        record["spec"]["weights_digest"] = "none"
    path.write_bytes(
        whole[:20] if damage == "torn" else json.dumps({**record, "a": 1} if damage == "more" else record).encode()
    )
    with caplog.at_level(logging.WARNING):
        found = find_backbone("resnet18", weights="random")
    assert "not a record of a backbone" in caplog.text
    assert isinstance(found, Backbone)
    assert described(found) == described(expected)
    assert path.read_bytes() == whole


def test_record__where_nothing_can_be_kept__is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert isinstance(find_backbone("resnet18", weights="random"), Backbone)
    assert isinstance(find_backbone("resnet18", weights="random"), Backbone)


def test_record__of_published_weights__needs_their_file_as_it_was(
    resnet18_file: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = registry.load_backbone("resnet18", weights=str(resnet18_file))
    monkeypatch.setattr(registry, "load_backbone", lambda *_, **__: backbone)
    find_backbone("resnet18")
    assert isinstance(find_backbone("resnet18"), KnownBackbone)
    resnet18_file.write_bytes(resnet18_file.read_bytes()[:-1])
    assert find_backbone("resnet18") is backbone
    assert isinstance(find_backbone("resnet18"), KnownBackbone)
    resnet18_file.unlink()
    monkeypatch.setattr(registry, "load_backbone", refuse)
    with pytest.raises(AssertionError, match="loaded again"):
        find_backbone("resnet18")


def test_record__that_cannot_be_written__is_said(
    resnet18_file: Path, records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records.parent.mkdir(parents=True)
    records.touch()  # a file where the folder should be
    with caplog.at_level(logging.WARNING):
        assert isinstance(find_backbone("resnet18", weights=str(resnet18_file)), Backbone)
    (line,) = [line for line in caplog.messages if "cannot be written" in line]
    assert line.endswith("the next run will load torch and the backbone again")
