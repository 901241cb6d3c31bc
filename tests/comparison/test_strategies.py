from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.cut import frozen_part
from transfercache.backbones.registry import Backbone
from transfercache.comparison import trained, tutorial
from transfercache.comparison.results import RunResult, save_result
from transfercache.comparison.rows import select_rows
from transfercache.comparison.strategies import STRATEGIES, load_kept, pick_strategies, result_path, run_strategy
from transfercache.comparison.strategy import Loop, Setting, Strategy
from transfercache.config import KNN_NEIGHBOURS
from transfercache.errors import DataError, UsageError
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.precision import training_compute
from transfercache.heads.fit import fit_head
from transfercache.heads.knn import knn_probabilities
from transfercache.images.decode import load_image
from transfercache.images.manifest import Manifest
from transfercache.spec import ExtractSpec

from .conftest import RECORD, MakeSetting, read, spec_of, write_photos

HEADS = ["logistic", "ridge", "linear"]
NAMES = ["knn", *HEADS, "pixels-knn", "tutorial-frozen", "partial", "finetune", "lp-ft", "scratch", "tutorial-finetune"]


def strategy(name: str) -> Strategy:
    return pick_strategies(name)[0]


@pytest.fixture(autouse=True)
def one_tutorial_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tutorial, "TUTORIAL_EPOCHS", 1)


def test_pick_strategies__cheapest_first_whatever_the_order() -> None:
    assert [item.name for item in STRATEGIES] == NAMES
    picked = pick_strategies("scratch, finetune,knn,knn")
    assert [item.name for item in picked] == ["knn", "finetune", "scratch"]


def test_pick_strategies__unknown_name() -> None:
    with pytest.raises(
        UsageError, match=r"unknown strategy 'finetun' \(did you mean finetune.*known are knn, logistic"
    ):
        pick_strategies("knn,finetun")
    with pytest.raises(UsageError, match="--strategies names none"):
        pick_strategies(" ,")


@pytest.mark.parametrize("name", NAMES)
def test_run_strategy__same_rows_and_all_training_rows_for_each(setting: Setting, name: str) -> None:
    result = run_strategy(strategy(name), setting, seed=1)
    assert result.strategy == name
    assert result.backbone == (None if name == "pixels-knn" else "resnet18")
    assert result.row.tolist() == [8, 9, 10, 11, 12, 13]
    assert result.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert (result.n_train, result.split, result.seed) == (8, "val", 1)
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert result.seconds.first >= result.seconds.again > 0
    assert result.environment["device"]
    assert result.tlc_version


@pytest.mark.parametrize("name", ["knn", *HEADS])
def test_cached__extraction_is_in_the_first_run_alone(setting: Setting, name: str) -> None:
    result = run_strategy(strategy(name), setting, seed=0)
    stages = result.seconds.stages
    assert list(stages) == ["extract", "load", "fit", "predict"]
    assert stages["extract"] == 12.0
    assert result.seconds.first == pytest.approx(12.0 + result.seconds.again)
    assert result.seconds.again == pytest.approx(stages["load"] + stages["fit"] + stages["predict"], rel=0.2)
    assert result.backbone_passes == 14
    assert result.extraction == RECORD


def test_cached__reading_the_record_is_no_part_of_the_seconds(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]  # on a clock that only the reading of the record moves
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class SlowlyAccounted:
        table = setting.embeddings().table

        @property
        def record(self) -> dict[str, Any]:
            now[0] += 100.0
            return RECORD

    result = run_strategy(strategy("knn"), replace(setting, embeddings=SlowlyAccounted), seed=0)
    assert (result.seconds.first, result.seconds.again) == (12.0, 0.0)


def test_cached__probabilities_are_those_of_the_heads_room(setting: Setting) -> None:
    train, reported = setting.rows.divide(setting.embeddings().table())
    queries = reported.features
    expected = {
        "knn": knn_probabilities(train.blocks, train.labels, queries, k=KNN_NEIGHBOURS, n_classes=2),
        "logistic": fit_head(train, solver="logistic", seed=5).probabilities(queries),
        "ridge": fit_head(train, solver="ridge", seed=5).probabilities(queries),
        "linear": fit_head(train, solver="linear", seed=5).probabilities(queries),
    }
    for name, probabilities in expected.items():
        np.testing.assert_array_equal(run_strategy(strategy(name), setting, seed=5).probabilities, probabilities)


def test_pixels_knn__equals_cosine_neighbours_by_hand(setting: Setting) -> None:
    manifest = setting.rows.manifest
    grey = [
        load_image(manifest.path_of(row), "").convert("L").resize((32, 32), resample=2)
        for row in range(manifest.n_rows)
    ]
    pixels = np.stack([np.asarray(image, dtype=np.float64).ravel() for image in grey])
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    nearest = np.argsort(-(pixels[8:] @ pixels[:8].T), axis=1)[:, :KNN_NEIGHBOURS]
    votes = np.stack([(manifest.labels[nearest] == label).mean(axis=1) for label in (0, 1)], axis=1)
    result = run_strategy(strategy("pixels-knn"), setting, seed=0)
    np.testing.assert_allclose(result.probabilities, votes, atol=1e-6)
    assert (result.backbone_passes, result.extraction) == (0, None)
    assert result.seconds.first == result.seconds.again


def test_finetune__equals_the_command_with_its_defaults(setting: Setting, backbone: Backbone) -> None:
    expected = finetune(
        setting.rows.manifest,
        Task(backbone, spec_of(backbone), torch.device("cpu")),
        options=FinetuneOptions(epochs=1, seed=2),
    )
    result = run_strategy(strategy("finetune"), setting, seed=2)
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)
    assert result.backbone_passes == 14
    assert result.seconds.first == result.seconds.again
    assert result.chosen["batch_norm"] == "frozen"
    assert [sorted(epoch) for epoch in result.chosen["by_epoch"]] == [["seconds", "train_accuracy", "train_loss"]]


def test_lp_ft__fine_tunes_from_the_logistic_head_and_pays_for_both(setting: Setting, backbone: Backbone) -> None:
    train, _ = setting.rows.divide(setting.embeddings().table())
    expected = finetune(
        setting.rows.manifest,
        Task(backbone, spec_of(backbone), torch.device("cpu"), fit_head(train, solver="logistic", seed=2)),
        options=FinetuneOptions(epochs=1, seed=2),
    )
    result = run_strategy(strategy("lp-ft"), setting, seed=2)
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)
    assert result.chosen["start"] == "logistic"
    assert result.backbone_passes == 14 + 14  # the extraction's, then one epoch and the evaluation
    assert list(result.seconds.stages) == ["extract", "load", "fit", "decode", "step", "evaluate"]
    assert result.seconds.first == pytest.approx(12.0 + result.seconds.again)
    assert result.seconds.again > result.seconds.stages["fit"] + result.seconds.stages["step"]
    assert result.extraction == RECORD


def test_partial__trains_the_last_stage_on_the_compared_rows_of_the_cache(
    make_setting: MakeSetting, manifest: Manifest, backbone: Backbone
) -> None:
    good = np.ones(manifest.n_rows, dtype=np.bool_)
    good[[1, 9]] = False  # as where another backbone cannot have them: row numbers are then not the data's
    setting = make_setting(manifest, rows=select_rows(manifest, is_good=good))
    expected = finetune(
        setting.rows.manifest,
        Task(backbone, spec_of(backbone), torch.device("cpu")),
        options=FinetuneOptions(epochs=1, seed=2, unfreeze="layer4", augment="none", compute="fp32"),
    )
    result = run_strategy(strategy("partial"), setting, seed=2)
    # Trained in bf16 where this processor has it.
    np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=0.02)
    assert result.row.tolist() == [8, 10, 11, 12, 13]
    assert result.chosen["cached"] == "layer3 256x2x2, float32, 1 views"
    assert result.backbone_passes == 14 + 12  # the extraction's, then one epoch and the evaluation
    assert list(result.seconds.stages) == ["extract", "read", "step", "evaluate"]
    assert result.seconds.first == pytest.approx(12.0 + result.seconds.again)
    assert result.extraction == RECORD


def test_partial__an_image_whose_activations_do_not_fit(make_setting: MakeSetting, manifest: Manifest) -> None:
    base = make_setting(manifest)

    def activations(backbone: Backbone, stage: str) -> Any:
        embeddings, whole = base.activations(backbone, stage)
        kept = whole.table.subset(whole.table.row != 2)
        return embeddings, replace(whole, table=kept, bad={2: "its embedding reaches 7e+04"})

    with pytest.raises(DataError, match=r"train/blue/2.png: its embedding reaches 7e\+04"):
        run_strategy(strategy("partial"), replace(base, activations=activations), seed=0)


def test_lp_ft__a_class_without_training_images(make_setting: MakeSetting, manifest: Manifest) -> None:
    labels = manifest.labels.copy()
    labels[-1] = 2
    setting = make_setting(replace(manifest, labels=labels, class_names=("blue", "red", "sky")))
    result = run_strategy(strategy("lp-ft"), setting, seed=0)
    assert result.probabilities.shape == (6, 3)
    assert np.isfinite(result.probabilities).all()


def test_scratch__random_weights_and_batch_norm_in_train_mode(make_setting: MakeSetting, manifest: Manifest) -> None:
    asked: list[str] = []

    def refuse() -> Backbone:
        raise AssertionError("scratch needs no pretrained weights")

    base = make_setting(manifest)

    def random_backbone() -> Backbone:
        asked.append("random")
        return base.random_backbone()

    result = run_strategy(strategy("scratch"), replace(base, backbone=refuse, random_backbone=random_backbone), seed=0)
    assert asked == ["random"]
    assert result.chosen["batch_norm"] == "train"


def test_tutorial__last_epoch_is_the_figure_and_the_best_is_kept_apart(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tutorial, trained):
        monkeypatch.setattr(module, "TUTORIAL_EPOCHS", 3)
    result = run_strategy(strategy("tutorial-finetune"), setting, seed=0)
    accuracies = [epoch["reported_accuracy"] for epoch in result.chosen["by_epoch"]]
    assert len(accuracies) == 3
    assert result.is_right.mean() == pytest.approx(accuracies[-1])
    assert result.best_on_reported == {"accuracy": max(accuracies), "epoch": 1 + int(np.argmax(accuracies))}
    assert result.chosen["by"] == "last epoch"
    assert result.backbone_passes == 3 * 14


def test_tutorial__best_epoch_counts_a_class_that_was_never_trained_on_as_wrong(
    make_setting: MakeSetting, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Class 2 is among the reported rows alone, and the network is surest of it.
    labels = manifest.labels.copy()
    labels[-1] = 2
    setting = make_setting(replace(manifest, labels=labels, class_names=("blue", "red", "sky")))
    certain = np.tile([0.1, 0.2, 0.7], (6, 1))
    monkeypatch.setattr(tutorial, "evaluate_epoch", lambda *_, **__: certain)
    result = run_strategy(strategy("tutorial-frozen"), setting, seed=0)
    assert result.predicted.tolist() == [1] * 6
    assert result.best_on_reported == {"accuracy": pytest.approx(2 / 6), "epoch": 1}
    assert result.chosen["by_epoch"][0]["reported_accuracy"] == result.is_right.mean()


def test_finetune__image_that_changed_meanwhile(make_setting: MakeSetting, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", train=4, val=3)
    setting = make_setting(read(folder))
    (folder / "train" / "red" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/red/2.png: it changed while it was being compared; run the same"):
        run_strategy(strategy("finetune"), setting, seed=0)


def test_work__images_that_pass_the_network(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(setting, epochs=4)
    work = {item.name: item.work(setting) for item in STRATEGIES if item.work is not None}
    assert {name: (item.trained, item.forward) for name, item in work.items()} == {
        "tutorial-frozen": (0, 5 * 14),
        "partial": (7, 14),  # layer4 has 0.227 of the multiplications
        "finetune": (4 * 8, 6),
        "lp-ft": (4 * 8, 6),
        "scratch": (4 * 8, 6),
        "tutorial-finetune": (5 * 8, 5 * 6),
    }


def test_work__is_timed_as_the_loop_runs(setting: Setting) -> None:
    loops = {item.name: item.work(replace(setting, workers=3)).loop for item in STRATEGIES if item.work is not None}
    compute = training_compute("auto", torch.device("cpu"))
    expected = Loop(32, torch.channels_last, 3, compute)
    assert loops["partial"] == loops["finetune"] == loops["lp-ft"] == loops["scratch"] == expected
    assert loops["tutorial-frozen"] == loops["tutorial-finetune"]
    assert loops["tutorial-finetune"].batch_size == 4
    assert loops["tutorial-finetune"].memory_format is torch.contiguous_format


def test_result_path__changes_with_what_the_result_depends_on(
    setting: Setting, manifest: Manifest, make_setting: MakeSetting
) -> None:
    folder = Path("results")
    path = result_path(folder, strategy("finetune"), setting, 0)
    assert path.parent == folder
    assert len(path.stem) == 64
    assert path.suffix == ".safetensors"
    others = [
        result_path(folder, strategy("scratch"), setting, 0),
        result_path(folder, strategy("finetune"), setting, 1),
        result_path(folder, strategy("finetune"), replace(setting, epochs=2), 0),
        result_path(folder, strategy("finetune"), make_setting(manifest.subset(np.arange(1, 14))), 0),
        result_path(
            folder, strategy("finetune"), replace(setting, spec=lambda b: replace(spec_of(b), boundary="x")), 0
        ),
    ]
    assert len({path, *others}) == 6
    assert result_path(folder, strategy("finetune"), replace(setting, workers=7), 0) == path


def test_result_path__partial__is_of_its_activations_and_not_of_the_embeddings(
    setting: Setting, backbone: Backbone
) -> None:
    spec = spec_of(frozen_part(backbone, "layer3"))

    def path_of(spec: ExtractSpec, planned_views: int, **changes: Any) -> Path:
        asked: list[str] = []
        changed = replace(
            setting, planned_activations=lambda _, stage: asked.append(stage) or (spec, planned_views), **changes
        )
        path = result_path(Path(), strategy("partial"), changed, 0)
        assert asked == ["layer3"]
        return path

    assert len({path_of(spec, 1), path_of(spec, 4), path_of(replace(spec, storage_dtype="float16"), 1)}) == 3
    assert path_of(spec, 1, n_views=4) == path_of(spec, 1)


def test_result_path__only_what_matters(setting: Setting) -> None:
    def refuse() -> Backbone:
        raise AssertionError("no weights are needed to name this")

    bare = replace(setting, backbone=refuse, epochs=9)
    for name in ("pixels-knn", "scratch"):
        assert result_path(Path(), strategy(name), bare, 0).name
    # Nothing in these is drawn, and the tutorial has its own number of epochs.
    assert result_path(Path(), strategy("knn"), setting, 0) == result_path(Path(), strategy("knn"), setting, 1)
    assert result_path(Path(), strategy("tutorial-frozen"), setting, 0) == result_path(
        Path(), strategy("tutorial-frozen"), replace(setting, epochs=9), 0
    )


def test_load_kept__found_again_with_the_rows_of_today(
    make_setting: MakeSetting, backbone: Backbone, manifest: Manifest, tmp_path: Path
) -> None:
    result = run_strategy(strategy("knn"), make_setting(manifest), seed=0)
    save_result(result, tmp_path / "kept.safetensors")
    setting = make_setting(manifest)
    later = replace(setting, rows=replace(setting.rows, row=setting.rows.row + 100))
    kept = load_kept(tmp_path / "kept.safetensors", strategy("knn"), later, 1)  # nothing in it is drawn
    assert kept is not None
    assert kept.row.tolist() == [108, 109, 110, 111, 112, 113]
    assert kept.date == result.date
    assert kept.extraction == {**RECORD, "is_from_this_run": False}
    assert load_kept(tmp_path / "other.safetensors", strategy("knn"), later, 0) is None


def test_load_kept__damaged_one_is_named_and_made_again(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert load_kept(path, strategy("knn"), setting, 0) is None
    assert f"{path}: not a result of this tlc" in caplog.text
    assert "it is computed again" in caplog.text


def test_load_kept__one_of_another_run_is_named_and_made_again(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept.safetensors"
    result = run_strategy(strategy("linear"), setting, seed=0)

    def is_taken(result: RunResult, name: str = "linear", seed: int = 0) -> bool:
        save_result(result, path)
        return load_kept(path, strategy(name), setting, seed) is not None

    fewer = replace(result, row=result.row[1:], target=result.target[1:], probabilities=result.probabilities[1:])
    assert is_taken(result)
    with caplog.at_level(logging.WARNING):
        assert not is_taken(fewer)
        assert not is_taken(replace(result, target=1 - result.target))
        assert not is_taken(result, "logistic")
        assert not is_taken(result, seed=1)
    assert caplog.messages == [f"{path}: of another run; delete it, or pass --fresh; it is computed again"] * 4
