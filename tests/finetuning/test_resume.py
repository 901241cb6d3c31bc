"""Stopped after any step, a run goes on to the same bits: weights, probabilities, losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.registry import Backbone
from transfercache.errors import UsageError
from transfercache.finetuning.checkpoints import Checkpoints
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult
from transfercache.finetuning.trainer import Trainer
from transfercache.images.manifest import Manifest

from .conftest import MakePhotos, read, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

#: All that has a state of its own: dropout, momentum or moments, averages, mixup, augmentation, selection.
PLAIN = {"epochs": 3, "batch_size": 4, "lr_backbone": 0.02, "lr_head": 0.1, "compute": "fp32"}
ALL = {
    **PLAIN,
    "optimizer": "adamw",
    "ema": 0.9,
    "mixup": 0.3,
    "label_smoothing": 0.1,
    "augment": "trivial",
    "batch_norm": "train",
    "warmup": 0.2,
    "select": 0.25,
    "patience": 3,
}


class Stopped(Exception):
    pass


@pytest.fixture
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint then, and not every other minute."""
    monkeypatch.setattr("transfercache.finetuning.checkpoints._SECONDS_BETWEEN", 0.0)


def _run(
    manifest: Manifest, backbone: Backbone, options: dict[str, Any], checkpoints: Checkpoints | None = None
) -> FinetuneResult:
    return finetune(
        manifest,
        Task(backbone, spec_of(backbone), torch.device("cpu")),
        options=FinetuneOptions(**options),
        checkpoints=checkpoints,
    )


def _stop_before(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    taken = iter(range(n_steps))
    step = Trainer.step

    def limited(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
        if next(taken, None) is None:
            raise Stopped
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "step", limited)


def _assert_same(found: FinetuneResult, expected: FinetuneResult) -> None:
    assert found.probabilities.tobytes() == expected.probabilities.tobytes()
    assert found.head.weight.tobytes() == expected.head.weight.tobytes()
    for name, tensor in expected.backbone_tensors.items():
        assert found.backbone_tensors[name].tobytes() == tensor.tobytes(), name
    for a, b in zip(found.epochs, expected.epochs, strict=True):
        assert (a.epoch, a.lr, a.train_loss, a.train_accuracy) == (b.epoch, b.lr, b.train_loss, b.train_accuracy)
        assert (a.selection_loss, a.selection_accuracy, a.passes) == (b.selection_loss, b.selection_accuracy, b.passes)
    assert (found.chosen_epoch, found.passes, found.bad) == (expected.chosen_epoch, expected.passes, expected.bad)
    assert found.n_train_per_class.tolist() == expected.n_train_per_class.tolist()


@pytest.mark.usefixtures("after_every_step")
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_resume__after_any_step_ends_in_the_same_bits(
    make_photos: MakePhotos,
    two_stages: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    folder = make_photos(train=8, val=3)
    (folder / "train" / "red" / "3.png").write_bytes(b"")  # met in the first epoch, and left out from the second on
    manifest = read(folder)
    expected = _run(manifest, two_stages, options)
    n_steps = 0
    for n_steps in range(1, 20):
        checkpoints = Checkpoints(tmp_path / f"{n_steps}")
        with monkeypatch.context() as patched, checkpoints.held():
            _stop_before(patched, n_steps)
            try:
                _run(manifest, two_stages, options, checkpoints)
            except Stopped:
                pass
            else:
                break
        resumed = Checkpoints(tmp_path / f"{n_steps}", resume=True)
        with resumed.held():
            _assert_same(_run(manifest, two_stages, options, resumed), expected)
    assert n_steps > 8  # some three in each of three epochs


@pytest.mark.usefixtures("after_every_step")
def test_resume__stopped_many_times(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(make_photos(train=8, val=3))
    expected = _run(manifest, two_stages, ALL)
    for _ in range(20):
        checkpoints = Checkpoints(tmp_path / "c", resume=True)
        with monkeypatch.context() as patched, checkpoints.held():
            _stop_before(patched, 2)
            try:
                result = _run(manifest, two_stages, ALL, checkpoints)
            except Stopped:
                continue
            break
    _assert_same(result, expected)
    assert result.seconds["total"] >= sum(record.seconds for record in result.epochs)


def test_resume__from_the_end_of_an_epoch_alone(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where epochs are short, none is written within one."""
    manifest = read(make_photos(train=8, val=3))
    checkpoints = Checkpoints(tmp_path / "c")
    with monkeypatch.context() as patched, checkpoints.held():
        _stop_before(patched, 6)
        with pytest.raises(Stopped):
            _run(manifest, two_stages, PLAIN, checkpoints)
    assert [path.name for path in sorted((tmp_path / "c").glob("*.pt"))] == ["000002-000000000000.pt"]
    resumed = Checkpoints(tmp_path / "c", resume=True)
    seen: list[int] = []
    with resumed.held():
        result = finetune(
            manifest,
            Task(two_stages, spec_of(two_stages), torch.device("cpu")),
            options=FinetuneOptions(**PLAIN),
            checkpoints=resumed,
            on_epoch=lambda record: seen.append(record.epoch),
        )
    _assert_same(result, _run(manifest, two_stages, PLAIN))
    assert seen == [2, 3]


@pytest.mark.usefixtures("after_every_step")
def test_resume__tells_where_it_goes_on(
    make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(make_photos(train=8, val=3))
    checkpoints = Checkpoints(tmp_path / "c")
    with monkeypatch.context() as patched, checkpoints.held():
        _stop_before(patched, 6)
        with pytest.raises(Stopped):
            _run(manifest, two_stages, PLAIN, checkpoints)
    lines: list[str] = []
    resumed = Checkpoints(tmp_path / "c", resume=True)
    with resumed.held():
        finetune(
            manifest,
            Task(two_stages, spec_of(two_stages), torch.device("cpu")),
            options=FinetuneOptions(**PLAIN),
            checkpoints=resumed,
            on_line=lines.append,
        )
    assert lines[0].startswith("training in fp32 on ")
    assert lines[1:] == ["going on after 1 epochs and 8 images of the next"]


def _relabel(manifest: Manifest) -> None:
    manifest.labels[0] = 1 - manifest.labels[0]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"lr_head": 0.2}, None, r"of another run \(--lr-head 0\.1 then, 0\.2 now\)"),
        ({"seed": 1, "epochs": 4}, None, r"of another run \(--epochs 3 then, 4 now, --seed 0 then, 1 now\)"),
        ({}, _relabel, r"of another run \(other images, labels or split\)"),
    ],
)
def test_resume__of_another_run_is_refused(
    make_photos: MakePhotos,
    two_stages: Backbone,
    tmp_path: Path,
    options: dict[str, Any],
    change: Callable[[Manifest], None] | None,
    message: str,
) -> None:
    manifest = read(make_photos(train=4, val=2))
    first = Checkpoints(tmp_path / "c")
    with first.held():
        _run(manifest, two_stages, PLAIN, first)
    if change is not None:
        change(manifest)
    second = Checkpoints(tmp_path / "c", resume=True)
    with second.held(), pytest.raises(UsageError, match=message):
        _run(manifest, two_stages, {**PLAIN, **options}, second)


def test_resume__threads_may_differ(make_photos: MakePhotos, two_stages: Backbone, tmp_path: Path) -> None:
    manifest = read(make_photos(train=4, val=2))
    first = Checkpoints(tmp_path / "c")
    with first.held():
        expected = _run(manifest, two_stages, {**PLAIN, "workers": 1}, first)
    second = Checkpoints(tmp_path / "c", resume=True)
    with second.held():
        _assert_same(_run(manifest, two_stages, {**PLAIN, "workers": 3}, second), expected)


def test_patience__ends_after_so_many_epochs_without_a_better_one(
    make_photos: MakePhotos, two_stages: Backbone
) -> None:
    manifest = read(make_photos(train=8, val=3))
    # So high a rate that later epochs are worse than earlier ones.
    options = {**PLAIN, "epochs": 30, "select": 0.25, "schedule": "constant", "lr_backbone": 0.3, "lr_head": 1.0}
    result = _run(manifest, two_stages, {**options, "patience": 2})
    losses = [record.selection_loss for record in result.epochs]
    assert len(losses) < 30
    assert result.chosen_epoch == 1 + int(np.argmin(losses)) == len(losses) - 2
