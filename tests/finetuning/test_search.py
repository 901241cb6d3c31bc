"""A search on held-out training rows, run for real: what it reads, what it chooses, and how it goes on after a kill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.registry import Backbone
from transfercache.errors import UsageError
from transfercache.finetuning.checkpoints import Checkpoints
from transfercache.finetuning.loop import Task, finetune, identify_run
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult
from transfercache.finetuning.rows import divide_rows
from transfercache.finetuning.search import Trial, check_effects, choose_trial, combine, search
from transfercache.finetuning.trainer import Trainer
from transfercache.finetuning.training import ignore
from transfercache.images.manifest import Manifest
from transfercache.splits import Split

from .conftest import MakePhotos, read, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
OPTIONS = FinetuneOptions(epochs=3, batch_size=4, lr_backbone=0.02, compute="fp32")
# What says which of the four trials are finished, and the one before it, which is kept too.
DONE, BEFORE = "try-done-000004-000000000000.pt", "try-done-000003-000000000000.pt"
GRID = {"lr_head": ["0.01", "0.1"], "schedule": ["cosine", "constant"]}


class Stopped(Exception):
    pass


def _train(
    backbone: Backbone, manifest: Manifest, options: FinetuneOptions, checkpoints: Checkpoints | None = None
) -> FinetuneResult:
    task = Task(backbone, spec_of(backbone), CPU)
    return finetune(manifest, task, options=options, checkpoints=checkpoints)


def _search(
    manifest: Manifest,
    backbone: Backbone,
    folder: Path,
    *,
    options: FinetuneOptions = OPTIONS,
    grid: dict[str, list[str]] = GRID,
    resume: bool = False,
    lines: list[str] | None = None,
) -> tuple[Trial, ...]:
    identity = identify_run(manifest, Task(backbone, spec_of(backbone), CPU), options)
    checkpoints = Checkpoints(folder, resume=resume, identity=identity)

    def train(rows: Manifest, settings: FinetuneOptions, kept: Checkpoints) -> FinetuneResult:
        return _train(backbone, rows, settings, kept)

    on_line = ignore if lines is None else lines.append
    with checkpoints.held():
        return search(train, manifest, options, combine(options, grid), checkpoints=checkpoints, on_line=on_line)


def _figures(trials: tuple[Trial, ...]) -> list[dict[str, Any]]:
    """All that a second search must give again."""
    return [{**asdict(trial), "seconds": None} for trial in trials]


def test_combine__all_in_the_order_given_with_values_of_the_option_s_type() -> None:
    grid = {"epochs": ["2", 3], "ema": ["none", 0.9], "unfreeze": ["all", "stage1+stage2"], "lr_head": ["1e-3"]}
    found = combine(FinetuneOptions(), grid)
    assert [tuple(values) for values in found] == [("epochs", "ema", "unfreeze", "lr_head")] * 8
    assert [tuple(values.values()) for values in found] == [
        (epochs, ema, unfreeze, 0.001)
        for epochs in (2, 3)
        for ema in (None, 0.9)
        for unfreeze in ("all", "stage1,stage2")
    ]
    assert type(found[0]["epochs"]) is int


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"lr_hed": ["1", "2"]}, r"--try lr-hed: must be one of epochs, batch-size, .* \(did you mean lr-head"),
        ({"seed": ["1", "2"]}, r"--try seed: must be one of epochs, batch-size, unfreeze, optimizer, lr-backbone"),
        ({"select": ["0.1", "0.2"]}, "--try select: must be one of "),
        ({"lr_head": "1e-3,1e-2"}, "--try lr-head: '1e-3,1e-2' must be a list of values"),
        ({"lr_head": ["1e-3", "high"]}, "--try lr-head=high: must be a number"),
        ({"lr_head": ["none", "1"]}, "--try lr-head=none: must be a number"),
        ({"epochs": ["2", "2.5"]}, r"--try epochs=2\.5: must be a whole number"),
        ({"lr_head": ["1", "-1"]}, r"--try: --lr-head -1\.0: must be a positive number"),
        ({"optimizer": ["sgd", "adam"]}, r"--try: --optimizer adam: must be sgd or adamw \(did you mean adamw\?\)"),
        ({"warmup": ["0", "1"]}, r"--try: --warmup 1\.0: must be at least 0 and below 1"),
        ({"lr_head": ["1e-3", "2e-3", "0.001"]}, r"--try lr-head: 0\.001 stands there twice"),
        ({"lr_head": ["1e-3"]}, "--try lr-head: leaves nothing to choose; give several values"),
        ({"lr_head": []}, "--try lr-head: leaves nothing to choose"),
        ({"batch_size": ["4", "8"]}, "--batch-size 4: is given and tried as well; leave out one of them"),
        ({"lr_backbone": ["1", "2"]}, r"--lr-backbone 0\.02: is given and tried as well"),
    ],
)
def test_combine__what_is_off_is_named(grid: dict[str, list[object]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combine(FinetuneOptions(batch_size=4, lr_backbone=0.02), grid)


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"unfreeze": "none"}, {"lr_backbone": [1, 2]}, "--try lr-backbone: .* with --unfreeze none; leave it"),
        ({"unfreeze": "none"}, {"lr_head": [1, 2], "batch_norm": ["frozen", "train"]}, "--try batch-norm: its values"),
        ({"unfreeze": "stage2"}, {"lr_decay": [0.5, 1]}, "--try lr-decay: .* with --unfreeze stage2; leave it"),
        ({}, {"unfreeze": ["none", "stage2"], "lr_decay": [0.5, 1]}, "the same with --unfreeze none or stage2; leave"),
        ({}, {"unfreeze": ["all", "stage1+stage2"]}, "--try unfreeze: its values all train the same with "),
        ({"augment": "none"}, {"crop_area": [0.5, 1]}, "--try crop-area: .* with --augment none; leave it"),
        ({}, {"unfreeze": ["all", "stage9"]}, "two_stages has no stage 'stage9'"),
    ],
)
def test_check_effects__an_option_that_changes_nothing(
    two_stages: Backbone, options: dict[str, Any], grid: dict[str, list[object]], message: str
) -> None:
    settings = FinetuneOptions(**options)
    with pytest.raises(UsageError, match=message):
        check_effects(two_stages, settings, combine(settings, grid))


@pytest.mark.parametrize(
    "grid",
    [
        {"unfreeze": ["none", "all"], "lr_backbone": [1, 2]},
        {"lr_head": [1, 2], "ema": [0.5]},
        {"lr_decay": [0.5, 1], "weight_decay": [0.1, 0]},
        {"batch_norm": ["frozen", "train"], "optimizer": ["sgd", "adamw"], "crop_area": [0.5, 1]},
    ],
)
def test_check_effects__options_that_change_something_in_some_combination(
    two_stages: Backbone, grid: dict[str, list[object]]
) -> None:
    check_effects(two_stages, FinetuneOptions(), combine(FinetuneOptions(), grid))
    check_effects(two_stages, FinetuneOptions(), ())


def test_search__each_trial_is_the_run_of_its_flags_on_the_rows_left(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path
) -> None:
    manifest = read(make_photos(train=10, val=3))
    lines: list[str] = []
    trials = _search(manifest, two_stages, tmp_path / "c", lines=lines)
    combinations = combine(OPTIONS, GRID)
    for trial, values in zip(trials, combinations, strict=True):
        plain = _train(two_stages, manifest, replace(OPTIONS, **values, select=0.2))
        last = plain.epochs[-1]  # the final run, which holds nothing out, keeps its last epoch
        assert (trial.held_out_log_loss, trial.held_out_accuracy) == (last.selection_loss, last.selection_accuracy)
        assert (trial.values, trial.epoch, trial.n_held_out) == (values, 3, 4)
        # The reported rows are all that the trial has not put through the network.
        assert trial.passes == plain.passes - 6 == 3 * (16 + 4)
    assert [line for line in lines if line.startswith("try")] == [
        "try 1 of 4: lr-head 0.01, schedule cosine",
        "try 2 of 4: lr-head 0.01, schedule constant",
        "try 3 of 4: lr-head 0.1, schedule cosine",
        "try 4 of 4: lr-head 0.1, schedule constant",
    ]
    losses = [trial.held_out_log_loss for trial in trials]
    assert len(set(losses)) == 4
    assert choose_trial(trials) is trials[int(np.argmin(losses))]
    assert lines[-1].startswith("the best of 4: lr-head ")
    assert (tmp_path / "c" / DONE).exists()  # until the run that follows has its model


def test_search__with_select_each_counts_at_its_own_best_epoch(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path
) -> None:
    manifest = read(make_photos(train=10, val=3))
    # A third of the labels is wrong, so that later epochs are worse than earlier ones.
    manifest.labels[::3] = 1 - manifest.labels[::3]
    options = replace(OPTIONS, epochs=6, select=0.3, schedule="constant", lr_backbone=0.3)
    (trial, _) = _search(manifest, two_stages, tmp_path / "c", options=options, grid={"lr_head": ["1", "0.1"]})
    plain = _train(two_stages, manifest, replace(options, lr_head=1.0))
    losses = [record.selection_loss for record in plain.epochs]
    assert trial.held_out_log_loss == min(loss for loss in losses if loss is not None) != losses[-1]
    assert (trial.epoch, trial.n_held_out) == (plain.chosen_epoch, 6)


def test_search__does_without_the_reported_images_and_labels(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path
) -> None:
    folder = make_photos(train=10, val=3, test=2)
    manifest = read(folder)
    expected = _figures(_search(manifest, two_stages, tmp_path / "a"))
    labels = np.where(manifest.split == Split.TRAIN, manifest.labels, 1 - manifest.labels)
    assert _figures(_search(replace(manifest, labels=labels), two_stages, tmp_path / "b")) == expected
    for path, split in zip(manifest.paths, manifest.split.tolist(), strict=True):
        if split != Split.TRAIN:
            (folder / path).unlink()
    assert _figures(_search(manifest, two_stages, tmp_path / "c")) == expected
    # That this can fail: a held-out image is read.
    held_out = divide_rows(manifest, select=0.2, seed=0).held_out
    (folder / manifest.paths[int(held_out[0])]).unlink()
    assert _figures(_search(manifest, two_stages, tmp_path / "d")) != expected


def test_search__a_loss_that_is_no_number_loses(make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path) -> None:
    manifest = read(make_photos(train=10, val=3))
    trials = _search(manifest, two_stages, tmp_path / "c", grid={"lr_head": ["1e38", "0.1"]})
    assert (trials[0].held_out_log_loss, trials[0].held_out_accuracy) == (None, None)
    assert (trials[0].epoch, trials[0].passes) == (1, 20)
    assert choose_trial(trials) is trials[1]
    # It is kept with the others, so that no later process tries it again.
    assert _figures(_search(manifest, two_stages, tmp_path / "c", grid={"lr_head": ["1e38", "0.1"]}, resume=True)) == (
        _figures(trials)
    )


def test_search__where_none_has_figures(make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path) -> None:
    manifest = read(make_photos(train=10, val=3))
    with pytest.raises(UsageError, match="--try: every combination diverged or ran out of memory; give lower rates"):
        _search(manifest, two_stages, tmp_path / "c", grid={"lr_head": ["1e38", "2e38"]})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("losses", "chosen"), [([0.5, 0.3, 0.3], 1), ([None, 0.3], 1), ([0.0, 0.1, None], 0)])
def test_choose_trial__ties_go_to_the_earlier(losses: list[float | None], chosen: int) -> None:
    trials = [Trial({"lr_head": float(n)}, None, loss, 0.5, 1, 1.0, 10, 4) for n, loss in enumerate(losses)]
    assert choose_trial(trials) is trials[chosen]


def _stop_before(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    taken = iter(range(n_steps))
    step = Trainer.step

    def limited(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
        if next(taken, None) is None:
            raise Stopped
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "step", limited)


def _stop(
    manifest: Manifest, backbone: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch, *, n_steps: int
) -> None:
    with monkeypatch.context() as patched:
        _stop_before(patched, n_steps)
        with pytest.raises(Stopped):
            _search(manifest, backbone, folder)


# Four steps an epoch, twelve a trial: in the second epoch of the second trial.
IN_THE_SECOND = 18


def test_search__stopped__goes_on_within_the_trial_that_was_under_way(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(make_photos(train=10, val=3))
    expected = _search(manifest, two_stages, tmp_path / "whole")
    _stop(manifest, two_stages, tmp_path / "c", monkeypatch, n_steps=IN_THE_SECOND)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["lock", "try-2-000002-000000000000.pt", "try-done-000001-000000000000.pt"]
    first = torch.load(tmp_path / "c" / names[-1], weights_only=True)["trials"]
    with monkeypatch.context() as patched:
        _stop_before(patched, 48 - 12 - 4)  # what was finished is not trained again: not one step more
        resumed = _search(manifest, two_stages, tmp_path / "c", resume=True)
    assert _figures(resumed) == _figures(expected)
    assert asdict(resumed[0]) == first[0]


def test_search__stopped__a_trial_that_diverges_then_has_the_seconds_of_all_its_processes(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(make_photos(train=10, val=3))
    _stop(manifest, two_stages, tmp_path / "c", monkeypatch, n_steps=IN_THE_SECOND)
    (path,) = (tmp_path / "c").glob("try-2-*.pt")
    state = torch.load(path, weights_only=True)
    state["seconds"]["total"] = 1000.0
    torch.save(state, path)
    step, taken = Trainer.step, iter(range(4))

    def no_number(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
        found = step(self, *args, **options)
        return found if next(taken, None) is None else found * torch.nan

    monkeypatch.setattr(Trainer, "step", no_number)
    trials = _search(manifest, two_stages, tmp_path / "c", resume=True)
    assert [trial.failure for trial in trials] == [None, "diverged", None, None]
    assert 1000 < trials[1].seconds < 1100


def test_search__what_a_kill_left_of_a_finished_trial_is_removed(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path
) -> None:
    manifest = read(make_photos(train=10, val=3))
    _search(manifest, two_stages, tmp_path / "c")
    (tmp_path / "c" / "try-2-000004-000000000000.pt").write_bytes(b"")
    _search(manifest, two_stages, tmp_path / "c", resume=True)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["lock", BEFORE, DONE]


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        (OPTIONS, {**GRID, "lr_head": ["0.01", "0.2"]}, r"\(--try lr-head 0\.01, schedule cosine; .* then, .*0\.2"),
        (replace(OPTIONS, epochs=4), GRID, r"of another run \(--epochs 3 then, 4 now\); give all as it was then"),
        (replace(OPTIONS, select=0.4), GRID, r"of another run \(--select None then, 0\.4 now\)"),
    ],
)
def test_search__trials_of_another_run_are_refused(
    make_photos: MakePhotos,
    two_stages: Backbone,
    tmp_path: Path,
    options: FinetuneOptions,
    grid: dict[str, list[str]],
    message: str,
) -> None:
    manifest = read(make_photos(train=10, val=3))
    _search(manifest, two_stages, tmp_path / "c")
    with pytest.raises(UsageError, match=rf"{DONE}: .*" + message):
        _search(manifest, two_stages, tmp_path / "c", options=options, grid=grid, resume=True)
    with pytest.raises(UsageError, match="holds the checkpoints of an unfinished run; go on with it by --resume"):
        _search(manifest, two_stages, tmp_path / "c")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    """In the name of an option, which would otherwise be read as it is."""
    data = bytearray(path.read_bytes())
    data[data.index(b"lr_head")] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip])
@pytest.mark.parametrize("n_damaged", [1, 2])
def test_search__damaged_trials_are_named_and_tried_again(
    make_photos: MakePhotos,
    two_stages: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    n_damaged: int,
) -> None:
    manifest = read(make_photos(train=6, val=2))
    grid = {"lr_head": ["0.01", "0.1"]}
    expected = _search(manifest, two_stages, tmp_path / "c", grid=grid)
    damaged = sorted((tmp_path / "c").glob("try-done-*.pt"), reverse=True)[:n_damaged]
    assert len(damaged) == n_damaged
    for path in damaged:
        damage(path)
    lines: list[str] = []
    with caplog.at_level(logging.WARNING):
        found = _search(manifest, two_stages, tmp_path / "c", grid=grid, resume=True, lines=lines)
    assert caplog.messages[:n_damaged] == [f"{path}: torn or damaged; it is passed over" for path in damaged]
    assert sum(line.startswith("try ") for line in lines) == n_damaged
    assert _figures(found) == _figures(expected)
