from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.cut import frozen_part
from transfercache.backbones.engines import EagerEngine, normalise
from transfercache.backbones.registry import Backbone
from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.table import FeatureTable
from transfercache.errors import UsageError
from transfercache.finetuning.activations import ActivationReader, Activations, boundary_before
from transfercache.finetuning.batches import ImageReader
from transfercache.finetuning.checkpoints import Checkpoints
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult
from transfercache.finetuning.trainer import Trainer
from transfercache.images.decode import load_image
from transfercache.images.manifest import Manifest
from transfercache.images.transforms import view_pixels
from transfercache.stopwatch import Stopwatch

from .conftest import MakePhotos, read, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 4,
    "unfreeze": "layer4",
    "lr_backbone": 0.02,
    "lr_head": 0.1,
    "augment": "none",
    "compute": "fp32",
}


def activate(
    manifest: Manifest, backbone: Backbone, *, stage: str = "layer3", n_views: int = 1, dtype: str = "float32"
) -> Activations:
    """What a cache would hold of the readable rows, computed here."""
    part = frozen_part(backbone, stage)
    engine = EagerEngine(part, CPU)
    readable = np.flatnonzero(manifest.is_readable())
    rows, views = np.repeat(readable, n_views), np.tile(np.arange(n_views, dtype=np.uint8), len(readable))

    def pixels(row: int, view: int) -> np.ndarray:
        image = load_image(manifest.path_of(row), manifest.paths[row])
        return view_pixels(image, backbone.preprocessing, digest=manifest.digests[row].tobytes(), view=view)

    stacked = np.stack([pixels(row, view) for row, view in zip(rows.tolist(), views.tolist(), strict=True)])
    table = FeatureTable(
        blocks=ArrayBlocks(engine.embed(stacked).astype(dtype).astype(np.float32)),
        labels=manifest.labels[rows],
        split=manifest.split[rows],
        view=views,
        group=manifest.component[rows],
        row=rows,
        class_names=manifest.class_names,
        spec=replace(spec_of(part), boundary=part.boundary, storage_dtype=dtype),
        paths=tuple(manifest.paths[row] for row in rows),
    )
    return Activations(stage, table, manifest.unreadable)


def run(
    manifest: Manifest,
    backbone: Backbone,
    activations: Activations | None,
    checkpoints: Checkpoints | None = None,
    **options: Any,
) -> FinetuneResult:
    return finetune(
        manifest,
        Task(backbone, spec_of(backbone), CPU, activations=activations),
        options=FinetuneOptions(**{**OPTIONS, **options}),
        checkpoints=checkpoints,
    )


def losses(result: FinetuneResult) -> list[float]:
    return [epoch.train_loss for epoch in result.epochs]


def test_boundary_before__is_the_stage_before_the_first_that_trains(resnet18: Backbone) -> None:
    def boundary(unfreeze: str) -> str:
        return boundary_before(resnet18, FinetuneOptions(unfreeze=unfreeze, augment="none"))

    assert [boundary(unfreeze) for unfreeze in ("layer4", "layer2", "layer4,layer3")] == ["layer3", "layer1", "layer2"]
    with pytest.raises(UsageError, match=r"--unfreeze all trains from the first stage on.*such as --unfreeze layer4"):
        boundary("all")
    with pytest.raises(UsageError, match="with --unfreeze none the head alone trains; tlc train-head does that"):
        boundary("none")
    with pytest.raises(UsageError, match="--augment crop is of images, and none is read; cache more --views"):
        boundary_before(resnet18, FinetuneOptions(unfreeze="layer4"))


@pytest.mark.parametrize("n_train", [3, 4, 6])  # of each class: one row too few, no remainder, one row left over
def test_batches__are_those_of_images(make_photos: MakePhotos, resnet18: Backbone, n_train: int) -> None:
    manifest = read(make_photos(train=n_train, val=2))
    options = FinetuneOptions(batch_size=4 if n_train != 6 else 11, augment="none", seed=3)
    images = ImageReader(options, Stopwatch(), manifest, resnet18.preprocessing)
    reader = ActivationReader(options, Stopwatch(), activate(manifest, resnet18))
    rows = np.arange(2 * n_train)
    for epoch in (1, 2):
        expected = [batch.rows.tolist() for batch in images.training_batches(rows, epoch)]
        assert [batch.rows.tolist() for batch in reader.training_batches(rows, epoch)] == expected
        left = [batch.rows.tolist() for batch in reader.training_batches(rows, epoch, after=expected[0][-1])]
        assert left == expected[1:]
    assert [batch.rows.tolist() for batch in reader.eval_batches(np.arange(6))] == [
        batch.rows.tolist() for batch in images.eval_batches(np.arange(6))
    ]


def test_batches__hold_the_drawn_view_of_each_row(make_photos: MakePhotos, resnet18: Backbone) -> None:
    manifest = read(make_photos(train=8, val=2))
    activations = activate(manifest, resnet18, n_views=3)
    table = activations.table
    reader = ActivationReader(FinetuneOptions(batch_size=4, seed=1), Stopwatch(), activations)
    rows, seen = np.arange(16), []
    for epoch in (1, 2):
        views = {}
        for batch in reader.training_batches(rows, epoch):
            for row, inputs in zip(batch.rows.tolist(), batch.inputs, strict=True):
                (same,) = np.flatnonzero((table.row == row) & (table.features == inputs).all(axis=1))
                views[row] = int(table.view[same])
        assert sorted(views) == rows.tolist()
        seen.append(views)
    assert {view for views in seen for view in views.values()} == {0, 1, 2}
    assert seen[0] != seen[1]
    for batch in reader.eval_batches(rows):
        np.testing.assert_array_equal(batch.inputs, table.features[3 * batch.rows])


def test_batches__leave_out_the_bad_rows(make_photos: MakePhotos, resnet18: Backbone) -> None:
    manifest = read(make_photos(train=4, val=2))
    activations = activate(manifest, resnet18)
    kept = Activations("layer3", activations.table.subset(activations.table.row != 5), {5: "torn"})
    reader = ActivationReader(FinetuneOptions(batch_size=4), Stopwatch(), kept)
    assert reader.readable(np.arange(8)).tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert np.concatenate([batch.rows for batch in reader.eval_batches(np.arange(8))]).tolist() == [
        0, 1, 2, 3, 4, 6, 7,
    ]  # fmt: skip
    result = run(manifest, resnet18, kept, epochs=1)
    assert (result.head.n_train, result.bad) == (7, ((manifest.paths[5], "torn"),))


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # float16 rounds an activation by up to 2^-11 of it; that moved losses by 7e-5 of themselves, probabilities by 1e-4.
    [("float32", 1e-5), ("float16", 1e-3)],
)
def test_finetune__losses_are_those_on_images_with_the_same_frozen_stages(
    make_photos: MakePhotos, resnet18: Backbone, dtype: str, bound: float
) -> None:
    manifest = read(make_photos(train=9, val=4))
    rates = {"lr_backbone": 1e-3, "lr_head": 1e-2}
    expected = run(manifest, resnet18, None, **rates)
    found = run(manifest, resnet18, activate(manifest, resnet18, dtype=dtype), **rates)
    assert losses(found) == pytest.approx(losses(expected), rel=bound)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=bound)
    assert found.reported_rows.tolist() == expected.reported_rows.tolist()
    assert (found.passes, found.head.n_train) == (expected.passes, expected.head.n_train)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "select": 0.25, "batch_norm": "train", "mixup": 0.2}])
def test_finetune__leaves_a_whole_network_whose_frozen_part_is_as_it_was(
    make_photos: MakePhotos, resnet18: Backbone, options: dict[str, Any]
) -> None:
    manifest = read(make_photos(train=8, val=4))
    activations = activate(manifest, resnet18, n_views=2)
    result = run(manifest, resnet18, activations, **options)
    before = resnet18.network.state_dict()
    assert list(result.backbone_tensors) == list(before)
    changed = {name for name in before if not np.array_equal(before[name].numpy(), result.backbone_tensors[name])}
    assert {name.split(".")[0] for name in changed} == {"layer4"}
    assert any("running_mean" in name for name in changed) == (options.get("batch_norm") == "train")
    assert result.head.chosen["cached"] == "layer3 256x2x2, float32, 2 views"
    # On the images, the whole network gives what was reported from the cache.
    val = np.flatnonzero(manifest.split == 2)
    images = [load_image(manifest.path_of(row), manifest.paths[row]) for row in val]
    pixels = np.stack([view_pixels(image, resnet18.preprocessing, digest=b"", view=0) for image in images])
    with torch.inference_mode():
        logits = result.network(normalise(torch.from_numpy(pixels), resnet18.preprocessing))
    assert result.reported_rows.tolist() == val.tolist()
    np.testing.assert_allclose(torch.softmax(logits.double(), dim=1), result.probabilities, atol=1e-5)


def test_finetune__what_trains_lies_before_the_activations(make_photos: MakePhotos, resnet18: Backbone) -> None:
    manifest = read(make_photos(train=4, val=2))
    with pytest.raises(UsageError, match="some of what trains lies before the end of layer3"):
        run(manifest, resnet18, activate(manifest, resnet18), unfreeze="layer3,layer4")


class Stopped(Exception):
    pass


def test_resume__after_any_step_ends_in_the_same_bits(
    make_photos: MakePhotos, resnet18: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfercache.finetuning.checkpoints._SECONDS_BETWEEN", 0.0)
    manifest = read(make_photos(train=6, val=2))
    activations = activate(manifest, resnet18, n_views=3)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 5, "ema": 0.9, "mixup": 0.3}
    expected = run(manifest, resnet18, activations, **options)
    step = Trainer.step
    for n_steps in (1, 2, 3):  # of four
        taken = iter(range(n_steps))

        def limited(self: Trainer, *args: Any, taken: Iterator[int] = taken, **words: Any) -> torch.Tensor:
            if next(taken, None) is None:
                raise Stopped
            return step(self, *args, **words)

        checkpoints = Checkpoints(tmp_path / str(n_steps))
        with monkeypatch.context() as patched, checkpoints.held():
            patched.setattr(Trainer, "step", limited)
            with pytest.raises(Stopped):
                run(manifest, resnet18, activations, checkpoints, **options)
        resumed = Checkpoints(tmp_path / str(n_steps), resume=True)
        with resumed.held():
            found = run(manifest, resnet18, activations, resumed, **options)
        assert found.probabilities.tobytes() == expected.probabilities.tobytes()
        for name, tensor in expected.backbone_tensors.items():
            assert found.backbone_tensors[name].tobytes() == tensor.tobytes(), name


def test_resume__of_other_activations_is_refused(make_photos: MakePhotos, resnet18: Backbone, tmp_path: Path) -> None:
    manifest = read(make_photos(train=4, val=2))
    checkpoints = Checkpoints(tmp_path)
    with checkpoints.held():
        run(manifest, resnet18, activate(manifest, resnet18), checkpoints, epochs=1)
    resumed = Checkpoints(tmp_path, resume=True)
    with (
        resumed.held(),
        pytest.raises(
            UsageError, match=r"cached activations layer3 256x2x2, float32, 1 views then, layer3 .* 2 views no"
        ),
    ):
        run(manifest, resnet18, activate(manifest, resnet18, n_views=2), resumed, epochs=1)
    with resumed.held(), pytest.raises(UsageError, match=r"cached activations layer3 256x2x2.* then, None now"):
        run(manifest, resnet18, None, resumed, epochs=1)
