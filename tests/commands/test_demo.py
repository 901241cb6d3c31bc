"""The demo where nothing can be downloaded, on real files and real ImageNet weights from the package registry."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from transfercache.commands import demo as module
from transfercache.images import named


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the discard port, and the demo is kept short."""
    monkeypatch.setattr(named, "_HYMENOPTERA_URL", "http://127.0.0.1:9/hymenoptera_data.zip")
    monkeypatch.setattr(module, "FALLBACK_DIGITS_PER_CLASS", 6)
    monkeypatch.setattr(module, "FALLBACK_EPOCHS", 1)


@pytest.mark.usefixtures("unreachable")
def test_demo__without_a_network__says_what_it_runs_on_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    estimates: list[str] = []
    with caplog.at_level(logging.WARNING):
        result = module.demo(cache_dir=tmp_path, on_estimate=lambda label, seconds: estimates.append(label))
    [line] = [message for message in caplog.messages if "127.0.0.1:9" in message]
    assert line.endswith("; so the demo runs on 6 digits a class with efficientnet_lite0")
    assert estimates[0] == "the whole demo"
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["demo"]["backbone"] == "efficientnet_lite0"
    assert "http://127.0.0.1:9/hymenoptera_data.zip: cannot be downloaded" in document["demo"]["why"]
    assert [item["name"] for item in document["strategies"]] == ["knn", "logistic", "linear", "finetune"]
    assert (document["n_train"], document["n_reported"]) == (50, 10)
    shown = io.StringIO()
    Console(width=200, file=shown).print(result.render())
    assert "in place of hymenoptera with resnet18, which cannot be had here" in " ".join(shown.getvalue().split())

    again = module.demo(cache_dir=tmp_path, on_estimate=lambda label, seconds: estimates.append(f"again {label}"))
    assert [item["kept"] for item in again.to_json()["strategies"]] == [True] * 4
    assert not [label for label in estimates if label.startswith("again")]
