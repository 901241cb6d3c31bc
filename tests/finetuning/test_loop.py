from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import normalise
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.config import CROP_AREA
from transfercache.errors import DataError, DivergenceError, ResourceError, UsageError
from transfercache.finetuning import loop
from transfercache.finetuning.batches import ImageReader
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import EpochRecord, FinetuneResult
from transfercache.finetuning.training import ignore
from transfercache.images.decode import load_image
from transfercache.images.manifest import Manifest
from transfercache.images.transforms import eval_pixels
from transfercache.splits import Split
from transfercache.stopwatch import Stopwatch

from .conftest import MakePhotos, copied_state, read, spec_of

# High enough that the tiny network learns in a few steps.
QUICK = {"epochs": 2, "batch_size": 4, "lr_backbone": 0.02, "lr_head": 0.1, "compute": "fp32"}


def _run(
    manifest: Manifest,
    backbone: Backbone,
    on_epoch: Callable[[EpochRecord], None] = ignore,
    **options: Any,
) -> FinetuneResult:
    settings = FinetuneOptions(**{**QUICK, **options})
    cpu = torch.device("cpu")
    return finetune(manifest, Task(backbone, spec_of(backbone), cpu), options=settings, on_epoch=on_epoch)


def _changed(backbone: Backbone, result: FinetuneResult) -> set[str]:
    """Names of the trunk's tensors that are not bit for bit what they were."""
    before = backbone.network.state_dict()
    assert set(before) == set(result.backbone_tensors)
    return {name for name in before if not np.array_equal(before[name].numpy(), result.backbone_tensors[name])}


def _logits(network: torch.nn.Module, backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: torch.Tensor = network(normalise(torch.from_numpy(pixels), backbone.preprocessing))
    return logits.numpy()


def test_finetune__red_and_green_are_told_apart_by_a_head_on_random_frozen_features(
    make_photos: MakePhotos, resnet18: Backbone
) -> None:
    manifest = read(make_photos(train=8, val=4))
    result = _run(manifest, resnet18, unfreeze="none", epochs=3)
    assert result.reported_rows.tolist() == list(range(16, 24))
    assert result.probabilities.argmax(axis=1).tolist() == manifest.labels[16:].tolist()
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1.0, rtol=1e-12)
    assert _changed(resnet18, result) == set()
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


def test_finetune__result_describes_the_run(make_photos: MakePhotos, two_stages: Backbone) -> None:
    manifest = read(make_photos(train=5, val=3))
    seen: list[EpochRecord] = []
    result = _run(manifest, two_stages, seen.append, batch_size=8)
    assert tuple(seen) == result.epochs
    assert [record.epoch for record in result.epochs] == [1, 2]
    assert (result.chosen_epoch, result.head.n_train, result.bad) == (2, 10, ())
    assert result.passes == 2 * 10 + 6  # two epochs of training, the reported split once
    assert [record.lr for record in result.epochs] == [
        pytest.approx({"stage1": 0.02, "stage2": 0.02, "head": 0.1}),
        pytest.approx({"stage1": 0.01, "stage2": 0.01, "head": 0.05}),  # half way down the cosine
    ]
    assert [(record.passes, record.n_bad) for record in result.epochs] == [(10, 0), (20, 0)]
    # Torch alone takes more than a hundred megabytes.
    assert all(2**27 < record.peak_memory_bytes < 2**40 for record in result.epochs)
    assert all(0 < record.train_loss < 10 and 0 <= record.train_accuracy <= 1 for record in result.epochs)
    assert all(record.selection_loss is record.selection_accuracy is None for record in result.epochs)
    assert set(result.seconds) == {"decode", "step", "evaluate", "total"}
    assert result.seconds["step"] + result.seconds["evaluate"] <= result.seconds["total"]
    assert result.head.chosen == {
        "epoch": 2,
        "epochs": 2,
        "by": "fixed schedule",
        "start": "new head",
        "cached": None,
        "batch_size": 8,
        "optimizer": "sgd",
        "lr_decay": 1.0,
        "schedule": "cosine",
        "warmup": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "augment": "crop",
        "crop_area": CROP_AREA,
        "ema": None,
        "compute": "fp32",
        "batch_norm": "frozen",
        "select": None,
        "patience": None,
        "seed": 0,
        "groups": [
            {"name": "stage1", "stages": ["stage1"], "lr": 0.02, "weight_decay": 0.0, "parameters": 240},
            {"name": "stage2", "stages": ["stage2"], "lr": 0.02, "weight_decay": 0.0, "parameters": 1200},
            {"name": "head", "stages": ["head"], "lr": 0.1, "weight_decay": 0.0, "parameters": 34},
        ],
    }


def test_finetune__the_network_the_head_and_the_canaries_are_one_model(
    make_photos: MakePhotos, two_stages: Backbone
) -> None:
    manifest = read(make_photos(train=4, val=3))
    result = _run(manifest, two_stages)
    assert not any(module.training for module in result.network.modules())
    pixels = np.stack(
        [eval_pixels(load_image(manifest.path_of(row), ""), two_stages.preprocessing) for row in result.reported_rows]
    )
    # One by one, as the whole, and from the parts that a model file keeps.
    whole = _logits(result.network, two_stages, pixels)
    alone = np.concatenate([_logits(result.network, two_stages, pixels[[row]]) for row in range(len(pixels))])
    np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-6)
    trunk = copy.deepcopy(two_stages.network)
    trunk.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in result.backbone_tensors.items()})
    np.testing.assert_allclose(result.head.logits(_logits(trunk, two_stages, pixels)), whole, rtol=1e-5, atol=1e-6)
    features = _logits(trunk, two_stages, pixels)
    np.testing.assert_allclose(result.head.probabilities(features), result.probabilities, rtol=1e-5, atol=1e-6)
    canaries = _logits(result.network, two_stages, canary_pixels(two_stages.preprocessing.crop))
    assert result.canary_logits.dtype == np.float32
    np.testing.assert_allclose(result.canary_logits, canaries, rtol=1e-5, atol=1e-6)


def test_finetune__same_seed_same_bits_whatever_the_threads(make_photos: MakePhotos, two_stages: Backbone) -> None:
    manifest = read(make_photos(train=5, val=2))
    first, again, other = (
        _run(manifest, two_stages, workers=workers, seed=seed) for workers, seed in [(1, 0), (4, 0), (4, 1)]
    )
    assert first.probabilities.tobytes() == again.probabilities.tobytes()
    for name, tensor in first.backbone_tensors.items():
        assert tensor.tobytes() == again.backbone_tensors[name].tobytes()
    assert first.head.weight.tobytes() == again.head.weight.tobytes()
    assert [record.train_loss for record in first.epochs] == [record.train_loss for record in again.epochs]
    assert first.probabilities.tobytes() != other.probabilities.tobytes()


def test_finetune__leaves_the_backbone_and_the_global_generators_alone(
    make_photos: MakePhotos, two_stages: Backbone
) -> None:
    manifest = read(make_photos(train=4, val=2))
    before = copied_state(two_stages.network)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    _run(manifest, two_stages, batch_norm="train")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in two_stages.network.state_dict().items())
    assert not any(module.training for module in two_stages.network.modules())


def test_finetune__frozen_batch_norm_keeps_every_statistic(make_photos: MakePhotos, resnet18: Backbone) -> None:
    manifest = read(make_photos(train=4))
    changed = _changed(resnet18, _run(manifest, resnet18, epochs=1))
    assert changed == {name for name, _ in resnet18.network.named_parameters()}


def test_finetune__only_unfrozen_stages_move(make_photos: MakePhotos, resnet18: Backbone) -> None:
    manifest = read(make_photos(train=4))
    for batch_norm in ("frozen", "train"):
        result = _run(manifest, resnet18, epochs=1, unfreeze="layer4", batch_norm=batch_norm)
        state = resnet18.network.state_dict()
        expected = {name for name in state if name.startswith("layer4.")}
        if batch_norm == "frozen":
            expected -= {name for name, _ in resnet18.network.named_buffers()}
        assert _changed(resnet18, result) == expected


@pytest.mark.parametrize("n_images", [2, 5])  # of each class: batches of 2, 2, and of 4, 4, 2 less one bad image
def test_finetune__one_image_left_over_does_not_break_batch_norm(
    make_photos: MakePhotos, two_stages: Backbone, n_images: int
) -> None:
    folder = make_photos(train=n_images, val=1)
    (folder / "train" / "red" / "1.png").write_bytes(b"")
    result = _run(read(folder), two_stages, batch_norm="train", batch_size=2 if n_images == 2 else 4)
    assert result.head.n_train == 2 * n_images - 1
    assert np.isfinite(result.probabilities).all()


def test_finetune__bad_images_are_listed_and_the_run_goes_on(make_photos: MakePhotos, two_stages: Backbone) -> None:
    folder = make_photos(train=5, val=3)
    (folder / "train" / "red" / "0.png").write_text("<html>404</html>")
    (folder / "val" / "green" / "1.png").write_bytes(b"")
    result = _run(read(folder), two_stages)
    html = "not an image (it starts like HTML)"
    assert result.bad == (("train/red/0.png", html), ("val/green/1.png", "empty file"))
    assert result.head.n_train == 9
    assert result.n_train_per_class.tolist() == [5, 4]
    assert result.reported_rows.tolist() == [10, 12, 13, 14, 15]
    assert result.probabilities.shape == (5, 2)
    assert result.passes == 2 * 9 + 5


def test_finetune__no_training_image_can_be_read(make_photos: MakePhotos, two_stages: Backbone) -> None:
    folder = make_photos(train=1, val=1)
    for name in ("red", "green"):
        (folder / "train" / name / "0.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of the 2 training images can be read; the first is train/green/0\.png: empty"
    ):
        _run(read(folder), two_stages)


def test_finetune__a_class_without_training_image_keeps_its_output(
    make_photos: MakePhotos, two_stages: Backbone
) -> None:
    folder = make_photos(train=4, val=2)
    (folder / "val" / "blue").mkdir()
    (folder / "val" / "red" / "0.png").rename(folder / "val" / "blue" / "0.png")
    result = _run(read(folder), two_stages)
    assert result.head.class_names == ("blue", "green", "red")
    assert result.probabilities.shape == (4, 3)


def test_finetune__no_reported_split(make_photos: MakePhotos, two_stages: Backbone) -> None:
    manifest = read(make_photos(train=4, val=2))
    result = _run(replace(manifest, labels=np.where(manifest.split == Split.TRAIN, manifest.labels, -1)), two_stages)
    assert (result.reported_rows.shape, result.probabilities.shape) == ((0,), (0, 2))


def test_finetune__rates_too_high(make_photos: MakePhotos, two_stages: Backbone) -> None:
    manifest = read(make_photos(train=8, val=2))
    message = (
        r"epoch \d: the loss is \w+; the rates are too high, give lower ones than --lr-backbone 1e\+30, --lr-head 0\.1"
    )
    with pytest.raises(UsageError, match=message):
        _run(manifest, two_stages, lr_backbone=1e30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # One step: the loss is that of the network before it.
        ({}, "epoch 1: the network after it gives no finite numbers; the rates are too high, give lower ones than "),
        ({"select": 0.25}, r"epoch 1: the held-out loss is (nan|inf); the rates are too high, give lower ones than "),
    ],
)
def test_finetune__rates_too_high_in_the_last_step(
    make_photos: MakePhotos, two_stages: Backbone, options: dict[str, Any], message: str
) -> None:
    manifest = read(make_photos(train=8, val=2))
    once = {"epochs": 1, "batch_size": 16, "schedule": "constant", "lr_backbone": 1e38, "lr_head": 1e38}
    with pytest.raises(DivergenceError, match=message):
        _run(manifest, two_stages, **once, **options)


def test_finetune__select_keeps_the_epoch_with_the_best_held_out_loss(
    make_photos: MakePhotos, two_stages: Backbone
) -> None:
    manifest = read(make_photos(train=8, val=3))
    # So high a rate that later epochs undo earlier ones for some seed; seeds where the last is best prove little.
    for seed in range(20):
        options = {
            "select": 0.25,
            "epochs": 4,
            "schedule": "constant",
            "lr_backbone": 0.3,
            "lr_head": 1.0,
            "seed": seed,
        }
        result = _run(manifest, two_stages, **options)
        if result.chosen_epoch < 4:
            break
    losses = [record.selection_loss for record in result.epochs]
    assert losses[result.chosen_epoch - 1] == min(losses)
    assert result.chosen_epoch < 4
    assert (result.head.n_train, result.passes) == (12, 4 * (12 + 4) + 6)
    assert result.n_train_per_class.tolist() == [6, 6]
    assert result.head.chosen["by"] == "log loss on 0.25 of the training rows"
    # A constant rate: the same run that stops there ends in the same network.
    stopped = _run(manifest, two_stages, **{**options, "epochs": result.chosen_epoch})
    assert stopped.chosen_epoch == result.chosen_epoch
    np.testing.assert_array_equal(stopped.head.weight, result.head.weight)
    np.testing.assert_array_equal(stopped.probabilities, result.probabilities)


def test_finetune__the_reported_labels_change_nothing(make_photos: MakePhotos, two_stages: Backbone) -> None:
    manifest = read(make_photos(train=8, val=3))
    flipped = replace(manifest, labels=np.where(manifest.split == Split.VAL, 1 - manifest.labels, manifest.labels))
    options = {"select": 0.25, "epochs": 4, "schedule": "constant", "lr_backbone": 0.3, "lr_head": 1.0}
    first, second = (_run(data, two_stages, **options) for data in (manifest, flipped))
    assert first.chosen_epoch == second.chosen_epoch
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert [record.selection_loss for record in first.epochs] == [record.selection_loss for record in second.epochs]


def test_finetune__reads_the_reported_split_once_at_the_end(
    make_photos: MakePhotos, two_stages: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(make_photos(train=4, val=2))
    forwards: list[tuple[str, int]] = []
    normalise_once = loop.normalise

    def noted(pixels: torch.Tensor, preprocessing: Any) -> torch.Tensor:
        forwards.append(("eval" if torch.is_inference_mode_enabled() else "train", len(pixels)))
        return normalise_once(pixels, preprocessing)

    monkeypatch.setattr(loop, "normalise", noted)
    _run(manifest, two_stages)
    assert forwards == [("train", 4)] * 4 + [("eval", 4), ("eval", 4)]  # the last four are the canaries


def test_finetune__rates_follow_the_cosine_step_by_step(
    make_photos: MakePhotos, two_stages: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[float]] = []
    step = torch.optim.SGD.step

    def noted(optimizer: torch.optim.SGD) -> None:
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        used.append([rates["stage2"], rates["head"]])
        step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    _run(read(make_photos(train=8)), two_stages, lr_backbone=0.1, lr_head=0.2)
    shares = 0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 8)  # two epochs of four steps
    np.testing.assert_allclose(used, np.outer(shares, [0.1, 0.2]), rtol=1e-12)


def test_finetune__one_step_is_plain_sgd(make_photos: MakePhotos, two_stages: Backbone) -> None:
    """Against torch's own optimiser on the whole set: one batch, no dropout because only the head trains."""
    manifest = read(make_photos(train=3))
    result = _run(manifest, two_stages, unfreeze="none", epochs=1, batch_size=6, lr_head=0.25)
    network = network_with_head(two_stages, 2, seed=0)
    head = network.get_submodule("fc")
    options = FinetuneOptions(batch_size=6)
    reader = ImageReader(options, Stopwatch(), manifest, two_stages.preprocessing)
    (batch,) = reader.training_batches(np.arange(6), 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.25, momentum=0.9)
    logits = network(normalise(torch.from_numpy(batch.inputs), two_stages.preprocessing))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(manifest.labels[batch.rows]))
    loss.backward()
    optimizer.step()
    assert result.epochs[0].train_loss == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(result.head.weight, head.weight.detach().numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.head.bias, head.bias.detach().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_finetune__a_batch_that_does_not_fit_into_memory(
    make_photos: MakePhotos, two_stages: Backbone, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def refuse(pixels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if phase == "train" or torch.is_inference_mode_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return normalise(pixels, two_stages.preprocessing)

    monkeypatch.setattr(loop, "normalise", refuse)
    with pytest.raises(ResourceError, match="cpu: out of memory for a batch of images; give a smaller --batch-size"):
        _run(read(make_photos(train=4, val=2)), two_stages)
