from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cli.output import finish
from transfercache.commands.describe import describe_backbone
from transfercache.commands.extract import Extraction
from transfercache.commands.finetune import finetune
from transfercache.commands.finetune_result import FinetuneOutcome
from transfercache.commands.train import train_head
from transfercache.errors import ModelError, UsageError
from transfercache.models.head_file import load_model

# A twentieth of ResNet-18's work.
SMALL: dict[str, Any] = {"backbone": "mobilenet_v3_small", "weights": "random", "epochs": 1, "batch_size": 12}


@pytest.fixture(scope="module")
def outcome(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOutcome:
    return finetune(
        pets, **SMALL, unfreeze="stage4,stage5", lr_decay=0.5, out=tmp_path_factory.mktemp("models") / "m.safetensors"
    )


def test_finetune__says_what_was_trained_and_what_it_cost(outcome: FinetuneOutcome) -> None:
    document = json.loads(json.dumps(outcome.to_json()))
    assert [(g["name"], g["stages"], g["weight_decay"]) for g in document["groups"]] == [
        ("stage4", ["stage4"], 0.0),
        ("stage5", ["stage5"], 0.0),
        ("head", ["head"], 0.0),
    ]
    rates = [group["lr"] for group in document["groups"]]
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-3])  # the seed's, for three times its batch
    assert load_model(outcome.model).head.chosen["groups"] == document["groups"]
    (epoch,) = document["epochs"]
    assert (epoch["passes"], document["backbone_passes"]) == (12, 16)
    assert epoch["peak_memory_bytes"] > 2**27
    assert epoch["images_per_second"] == pytest.approx(12 / epoch["seconds"])
    assert document["compute"] in ("fp32", "bf16")


def test_finetune__the_same_for_a_person(outcome: FinetuneOutcome, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(outcome, as_json=False) == 0
    printed = capsys.readouterr().out
    stage4 = outcome.groups[0]
    assert f"stage4: {stage4.parameters:,} parameters, lr 0.00015, weight decay 0" in printed
    assert f"epoch 1 of 1 in {outcome.compute}, " in printed
    assert "images/s), 16 passes, at most " in printed


def test_finetune__from_the_head_of_a_cache(pets: Path, extraction: Extraction, tmp_path: Path) -> None:
    head = train_head(extraction, C=1.0, out=tmp_path / "head.safetensors")
    # A rate that moves nothing: what comes out is what went in.
    same: dict[str, Any] = {**SMALL, "backbone": "resnet18", "unfreeze": "none", "lr_head": 1e-30}
    outcome = finetune(pets, **same, init_head=tmp_path / "head.safetensors", out=tmp_path / "m.safetensors")
    np.testing.assert_array_equal(
        load_model(outcome.model).head.weight, load_model(tmp_path / "head.safetensors").head.weight
    )
    assert outcome.reported is not None
    assert head.reported is not None
    assert outcome.reported.accuracy == head.reported.accuracy
    assert outcome.reported.log_loss == pytest.approx(head.reported.log_loss, abs=1e-5)


def test_finetune__a_head_that_does_not_fit(
    pets: Path, extraction: Extraction, outcome: FinetuneOutcome, tmp_path: Path
) -> None:
    train_head(extraction, C=1.0, out=tmp_path / "head.safetensors")
    refused = [
        (tmp_path / "head.safetensors", UsageError, "--init-head: it was trained on features of resnet18 with weights"),
        (outcome.model, UsageError, "its head fits the backbone in it alone; give a MODEL of train-head"),
        (tmp_path / "none.safetensors", ModelError, "no such model file"),
    ]
    for path, kind, message in refused:
        with pytest.raises(kind, match=message):
            finetune(pets, **SMALL, init_head=path, out=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    assert not (tmp_path / "m.safetensors.checkpoints").exists()


def test_finetune__keeps_a_checkpoint_at_least(pets: Path) -> None:
    with pytest.raises(UsageError, match=r"^--keep-checkpoints 0: must be at least 1$"):
        finetune(pets, keep_checkpoints=0)


def test_describe_backbone__stages_and_what_would_train(capsys: pytest.CaptureFixture[str]) -> None:
    description = describe_backbone("resnet18", unfreeze="layer3,layer4", lr_decay=0.5, batch_size=4, weight_decay=0.01)
    assert finish(description, as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["backbone"], document["dim"]) == ("resnet18", 512)
    assert [(stage["name"], stage["parameters"], stage["ends_at"]) for stage in document["stages"]] == [
        ("layer1", 157_504, "layer1"),
        ("layer2", 525_568, "layer2"),
        ("layer3", 2_099_712, "layer3"),
        ("layer4", 8_393_728, "layer4"),
    ]
    assert [(group["name"], group["lr"], group["parameters"]) for group in document["groups"]] == [
        ("layer3", 5e-5, 2_099_712),
        ("layer4", 1e-4, 8_393_728),
        ("head", 1e-3, 513),
    ]
    assert finish(description, as_json=False) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "layer" in line or "head" in line]
    assert rows[0][-1] == "frozen" or "frozen" in rows[0]
    assert any("5e-05" in row for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19'"),
        ({"backbone": "resnet18", "unfreeze": "layer5"}, "resnet18 has no stage 'layer5'"),
        ({"backbone": "resnet18", "lr_decay": 0.0}, "--lr-decay 0.0: must lie above 0"),
    ],
)
def test_describe_backbone__words_that_are_off(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        describe_backbone(**words)
