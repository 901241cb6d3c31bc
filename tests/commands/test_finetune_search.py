"""`tlc finetune --try`: what is chosen trains as its flags alone would, and the whole search is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from transfercache.cli.output import finish
from transfercache.commands.extract import Extraction
from transfercache.commands.finetune import finetune, parse_tries
from transfercache.commands.finetune_result import FinetuneOutcome
from transfercache.commands.train import train_head
from transfercache.errors import UsageError
from transfercache.finetuning.result import EpochRecord
from transfercache.models.head_file import load_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"backbone": "mobilenet_v3_small", "weights": "random", "epochs": 2, "batch_size": 12}
GRID: dict[str, list[Any]] = {"lr_head": [1e-3, 3e-2], "ema": ["none", 0.5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def told() -> list[str]:
    """The lines of the run of `outcome`, and the epochs between them."""
    return []


@pytest.fixture(scope="module")
def outcome(pets: Path, folder: Path, told: list[str]) -> FinetuneOutcome:
    def tell_epoch(record: EpochRecord) -> None:
        told.append(f"epoch {record.epoch}")

    return finetune(
        pets,
        **SMALL,
        unfreeze="none",
        grid=GRID,
        out=folder / "m.safetensors",
        on_epoch=tell_epoch,
        on_line=told.append,
    )


def _chosen(outcome: FinetuneOutcome) -> dict[str, Any]:
    (values,) = (trial["values"] for trial in outcome.to_json()["trials"] if trial["is_chosen"])
    return dict(values)


def test_try__the_model_is_that_of_the_chosen_flags_alone(outcome: FinetuneOutcome, pets: Path, folder: Path) -> None:
    values = _chosen(outcome)
    plain = finetune(
        pets,
        **SMALL,
        unfreeze="none",
        lr_head=values["lr_head"],
        ema=values["ema"] or "none",
        out=folder / "plain.safetensors",
    )
    assert (folder / "m.safetensors").read_bytes() == (folder / "plain.safetensors").read_bytes()
    assert outcome.to_json()["reported"] == plain.to_json()["reported"]
    assert outcome.n_train == plain.n_train == 12
    assert not (folder / "m.safetensors.checkpoints").exists()
    assert (plain.trials, plain.to_json()["trials"], plain.to_json()["search_passes"]) == ((), [], 0)
    assert "search" not in plain.seconds


def test_try__tells_each_trial_and_what_all_cost(outcome: FinetuneOutcome) -> None:
    document = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    trials = document["trials"]
    assert [trial["values"] for trial in trials] == [
        {"lr_head": 1e-3, "ema": None},
        {"lr_head": 1e-3, "ema": 0.5},
        {"lr_head": 3e-2, "ema": None},
        {"lr_head": 3e-2, "ema": 0.5},
    ]
    losses = [trial["held_out_log_loss"] for trial in trials]
    assert [trial["is_chosen"] for trial in trials] == [loss == min(losses) for loss in losses]
    # 10 of 12 rows train in each of two epochs, 2 are evaluated after each; nothing else goes through the network.
    assert [(trial["passes"], trial["n_held_out"], trial["epoch"]) for trial in trials] == [(24, 2, 2)] * 4
    assert document["search_passes"] == 96
    assert document["backbone_passes"] == 96 + 2 * 12 + 4
    seconds = document["seconds"]
    assert seconds["search"] == pytest.approx(sum(trial["seconds"] for trial in trials))
    assert seconds["total"] > seconds["search"] + seconds["step"]


def test_try__tells_what_is_tried_as_it_begins(outcome: FinetuneOutcome, told: list[str]) -> None:
    assert outcome.trials
    chosen = ", ".join(f"{name.replace('_', '-')} {value or 'none'}" for name, value in _chosen(outcome).items())
    assert [line for line in told if not line.startswith("training in ")] == [
        line
        for first in (
            "try 1 of 4: lr-head 0.001, ema none",
            "try 2 of 4: lr-head 0.001, ema 0.5",
            "try 3 of 4: lr-head 0.03, ema none",
            "try 4 of 4: lr-head 0.03, ema 0.5",
            f"the best of 4: {chosen}",
        )
        for line in (first, "epoch 1", "epoch 2")
    ]


def test_try__the_same_for_a_person(outcome: FinetuneOutcome, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(outcome, as_json=False) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("tried with 2 training rows held out")
    rows = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in printed.splitlines() if line[0] == "│"]
    for row, trial in zip(rows, outcome.to_json()["trials"], strict=False):
        values = [str(value or "none") for value in trial["values"].values()]
        figures = [f"{trial['held_out_log_loss']:.4f}", f"{trial['held_out_accuracy']:.3f}", "2"]
        assert [*row[:5], row[6]] == [*values, *figures, "chosen" if trial["is_chosen"] else ""]
    run, search = (line for line in printed.splitlines() if line.endswith(("of memory", "96 passes")))
    assert ", 28 passes, at most " in run
    assert search == f"the search before it took {outcome.seconds['search']:.1f} s and 96 passes"


def test_try__stands_in_the_card(outcome: FinetuneOutcome, folder: Path) -> None:
    card = json.loads((folder / "m.card.json").read_bytes())
    assert card["trials"] == outcome.to_json()["trials"]
    assert card["seconds"] == pytest.approx(outcome.seconds["total"], abs=1e-3)
    text = (folder / "m.card.md").read_text()
    assert "## What was tried\nTrained without 2 of the training images, and judged by the log loss on those." in text
    loss = outcome.trials[0].held_out_log_loss
    assert f"| `--lr-head 0.001`; `--ema none` | {loss:.4f} | " in text
    assert text.count("| chosen |") == 1


def test_try__activations_are_made_once(pets: Path, tmp_path: Path) -> None:
    cached: dict[str, Any] = {**SMALL, "unfreeze": "stage5", "cached": True, "cache_dir": tmp_path / "cache"}
    outcome = finetune(pets, **cached, grid={"lr_head": ["1e-3", "3e-2"]}, out=tmp_path / "m.safetensors")
    assert outcome.extraction is not None
    assert outcome.extraction["images"] == 16
    assert outcome.to_json()["search_passes"] == 48
    lr_head = _chosen(outcome)["lr_head"]
    plain = finetune(pets, **cached, lr_head=lr_head, out=tmp_path / "plain.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert plain.extraction is not None
    assert plain.extraction["cache"] == outcome.extraction["cache"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {"unfreeze": ["stage5", "stage9"]}}, "has no stage 'stage9'"),
        (
            {"grid": {"unfreeze": ["stage4", "stage5"]}, "cached": True},
            "--try unfreeze: is not for --cached, where the ",
        ),
        ({"grid": {"augment": ["crop", "none"]}, "cached": True}, "--try augment: is not for --cached"),
        ({"grid": {"lr_head": [1, 2]}, "lr_head": 0.1}, r"--lr-head 0\.1: is given and tried as well"),
    ],
)
def test_try__what_cannot_be_tried_is_refused_before_anything_trains(
    pets: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(pets, **{**SMALL, **options}, out=tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr-head"], "--try lr-head: must be an option and its values, such as lr-head=1e-3,3e-3"),
        (["lr-head=1,2", "lr_head=3"], "--try lr_head=3: lr_head is tried already; give all its values at once"),
    ],
)
def test_parse_tries__words_that_are_off(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tries(words)


def test_parse_tries__in_the_order_given() -> None:
    parsed = parse_tries(["lr-head=1e-3,3e-3", "unfreeze=none,layer3+layer4"])
    assert list(parsed.items()) == [("lr_head", ["1e-3", "3e-3"]), ("unfreeze", ["none", "layer3+layer4"])]


class Stopped(Exception):
    pass


def test_try__stopped_after_the_search__the_chosen_run_alone_goes_on(pets: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "unfreeze": "none", "grid": {"lr_head": [1e-3, 3e-2]}}
    seen: list[EpochRecord] = []

    def stop(record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == 5:  # two trials of two epochs, and one of the run
            raise Stopped

    with pytest.raises(Stopped):
        finetune(pets, **options, out=tmp_path / "m.safetensors", on_epoch=stop)
    lines: list[str] = []
    resumed = finetune(pets, **options, out=tmp_path / "m.safetensors", resume=True, on_line=lines.append)
    assert [line for line in lines if line.startswith(("try", "going"))] == [
        "going on after 1 epochs and 0 images of the next"
    ]
    whole = finetune(pets, **options, out=tmp_path / "whole.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert resumed.backbone_passes == whole.backbone_passes == 2 * 24 + 28
    assert not (tmp_path / "m.safetensors.checkpoints").exists()


def test_try__from_a_head_that_was_calibrated_since_is_another_run(
    pets: Path, extraction: Extraction, tmp_path: Path
) -> None:
    head = tmp_path / "head.safetensors"
    train_head(extraction, C=1.0, out=head)
    options: dict[str, Any] = {**SMALL, "backbone": "resnet18", "unfreeze": "none", "epochs": 1, "init_head": head}
    options |= {"grid": {"lr_head": [1e-3, 3e-2]}, "out": tmp_path / "m.safetensors"}
    seen: list[EpochRecord] = []

    def stop(record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        finetune(pets, **options, on_epoch=stop)
    model = load_model(head)
    save_model(replace(model, head=replace(model.head, temperature=2.0)), head)
    with pytest.raises(UsageError, match=r"try-done-\d+-0+\.pt: of another run \(other --init-head\)"):
        finetune(pets, **options, resume=True)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"grid": {"lr_head": [1, 2]}}, {}, r"holds the trials of a run with --try; give it as then, or remove"),
        ({}, {"grid": {"lr_head": [1, 2]}}, r"holds the checkpoints of a run without --try; leave it out as then"),
    ],
)
def test_try__a_run_goes_on_as_it_began(
    pets: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    def stop(record: EpochRecord) -> None:
        raise Stopped

    out: dict[str, Any] = {**SMALL, "unfreeze": "none", "out": tmp_path / "m.safetensors"}
    with pytest.raises(Stopped):
        finetune(pets, **out, **first, on_epoch=stop)
    with pytest.raises(UsageError, match=message):
        finetune(pets, **out, **second, resume=True)
    assert finetune(pets, **out, **first, resume=True).model.exists()
