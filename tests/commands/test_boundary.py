"""Activations at a stage's end: their cache, and fine-tuning from it."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from transfercache.backbones.cut import frozen_part
from transfercache.backbones.registry import load_backbone
from transfercache.cache.reader import open_cache
from transfercache.cli.output import finish
from transfercache.commands import space
from transfercache.commands.cache import cache_info, list_caches, prune_caches
from transfercache.commands.compare import compare
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.finetune_result import FinetuneOutcome
from transfercache.commands.predict import predict
from transfercache.commands.space import parse_bytes
from transfercache.commands.train import train_head
from transfercache.errors import ResourceError, UsageError
from transfercache.extract import loop
from transfercache.models.head_file import load_model

SMALL: dict[str, Any] = {"weights": "random", "device": "cpu", "engine": "eager"}
TRAINED: dict[str, Any] = {
    "weights": "random", "unfreeze": "layer4", "epochs": 2, "batch_size": 6, "lr_backbone": 1e-3, "lr_head": 1e-2,
    "compute": "fp32", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boundary")


@pytest.fixture(scope="module")
def layer3(pets: Path, cache_dir: Path) -> Extraction:
    """The cache of `pets` at the end of resnet18's layer3, in two views; never to be changed."""
    return extract_features(pets, **SMALL, boundary="layer3", views=2, cache_dir=cache_dir)


def test_extract__keeps_the_activations_of_a_stage(pets: Path, layer3: Extraction, cache_dir: Path) -> None:
    cache = layer3.open()
    assert layer3.cache.name.startswith("pets-resnet18-layer3-256x14x14-")
    assert (cache.spec.boundary, cache.spec.storage_dtype) == ("layer3 256x14x14", "float16")
    assert (cache.spec.row_shape, layer3.dim, layer3.computed) == ((256, 14, 14), 50176, 32)
    table = cache.table()
    exact = extract_features(
        pets, **SMALL, boundary="layer3", views=2, storage_dtype="float32", cache_dir=cache_dir
    ).table()
    assert exact.features.astype(np.float16).astype(np.float32).tobytes() == table.features.tobytes()
    (shard,) = layer3.cache.glob("*.h5")
    with h5py.File(shard) as file:  # as any program shows it
        assert file["features"].shape == (32, 256, 14, 14)
        np.testing.assert_array_equal(file["features"][3].ravel(), table.features[3])


def test_extract__names_the_command_that_trains_behind_it(pets: Path, layer3: Extraction, cache_dir: Path) -> None:
    words = ("tlc", "finetune", str(pets), "--cached", "--unfreeze", "layer4", "--weights", "random", "--views", "2")
    assert layer3.next_command == (*words, "--cache-dir", str(cache_dir))


def test_extract__goes_on_where_it_was_and_reuses(pets: Path, layer3: Extraction, cache_dir: Path) -> None:
    lines: list[str] = []
    again = extract_features(
        pets, **SMALL, boundary="layer3", cache_dir=cache_dir, max_bytes="1kB", on_engine=lines.append
    )
    assert (again.cache, again.views, again.computed, again.reused) == (layer3.cache, 2, 0, 32)
    assert lines == []  # nothing is written, so that nothing has to be told or refused


def test_cache_commands__show_the_boundary(layer3: Extraction, cache_dir: Path) -> None:
    summaries = {item.cache: item for item in list_caches(cache_dir=cache_dir).value}
    assert summaries[layer3.cache].boundary == "layer3 256x14x14"
    info = cache_info(layer3.cache)
    assert (info.document["dim"], info.document["spec"]["boundary"]) == (50176, "layer3 256x14x14")
    assert "boundary: layer3 256x14x14" in info.render().plain


def test_prune__moves_rows_of_activations_bit_for_bit(draw_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)])
    words: dict[str, Any] = {**SMALL, "boundary": "layer3", "cache_dir": tmp_path / "cache"}
    before = extract_features(photos, **words).table().features[1:]
    (photos / "cat" / "0.png").unlink()
    cache = extract_features(photos, **words).cache
    (freed,) = prune_caches(cache).value
    assert freed.bytes > 100_000
    np.testing.assert_array_equal(open_cache(cache).table().features, before)


def test_extract__tells_what_it_will_write_and_refuses_more(pets: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {**SMALL, "boundary": "layer3", "views": 2, "cache_dir": tmp_path / "cache"}
    with pytest.raises(UsageError) as raised:
        extract_features(pets, **words, max_bytes="3MB")
    assert str(raised.value) == (
        "layer3 256x14x14: 32 rows of 102 kB, 3.3 MB in all, more than --max-bytes 3.0 MB; "
        "pass --max-bytes 1GB, or fewer --views, or cut the network after a later stage"
    )
    assert not (tmp_path / "cache").exists()  # nothing was written
    lines: list[str] = []
    made = extract_features(pets, **words, max_bytes="4MB", on_engine=lines.append)
    assert lines[0].startswith("layer3 256x14x14: 32 rows of 102 kB, 3.3 MB in all; ")
    (shard,) = made.cache.glob("*.h5")
    assert 3_210_000 < shard.stat().st_size <= 3_300_000


def test_extract__by_default_20_gb_of_activations_and_no_bound_for_embeddings(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "shard_bytes", lambda *_, **__: 21 * 10**9)
    with pytest.raises(UsageError, match=r"21.0 GB in all, more than --max-bytes 20.0 GB; pass --max-bytes 21GB"):
        extract_features(pets, **SMALL, boundary="layer3", cache_dir=tmp_path)
    assert extract_features(pets, **SMALL, cache_dir=tmp_path).computed == 16
    with pytest.raises(UsageError, match=r"pooled: 16 rows of .* more than --max-bytes 1.0 GB; .* or fewer --views$"):
        extract_features(pets, **SMALL, cache_dir=tmp_path / "other", max_bytes="1GB")


def test_extract__a_disk_that_is_too_small(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"1\.7 MB in all, and .* has 1\.0 kB free; free some space, or name anot"):
        extract_features(pets, **SMALL, boundary="layer3", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_extract__a_row_that_is_too_wide(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="densenet121, stage1 256x56x56: 802,816 numbers an image, and a cache's row has at"
    ):
        extract_features(pets, **SMALL, backbone="densenet121", boundary="stage1", cache_dir=tmp_path)


def test_extract__commits_wide_rows_by_their_bytes(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    commit = loop._RowWriter.commit

    def counted(self: loop._RowWriter) -> None:
        commits.append(self.n_uncommitted)
        commit(self)

    monkeypatch.setattr(loop._RowWriter, "commit", counted)
    monkeypatch.setattr(loop, "_BYTES_PER_COMMIT", 8 * 50176 * 4)
    extract_features(pets, **SMALL, boundary="layer3", batch_size=4, cache_dir=tmp_path)
    assert commits == [8, 8, 0]


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("20GB", 20 * 10**9), ("1.5 MB", 1_500_000), ("500k", 500_000), ("7", 7), (9, 9)]
)
def test_parse_bytes(size: str | int, n_bytes: int) -> None:
    assert parse_bytes(size) == n_bytes


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "1e9", "20 gigabytes", "1GiB"])
def test_parse_bytes__no_size(size: str) -> None:
    with pytest.raises(UsageError, match=r"--max-bytes .*: give a size such as 20GB or 500MB"):
        parse_bytes(size)


def test_train_head__takes_no_activations(pets: Path, layer3: Extraction) -> None:
    for solver in ("logistic", "knn"):
        with pytest.raises(UsageError) as raised:
            train_head(layer3.cache, solver=solver)
        assert str(raised.value) == (
            f"{layer3.cache}: holds activations of layer3 256x14x14, which no head takes; train the stages behind them "
            f"with: tlc finetune {pets} --cached --unfreeze STAGES"
        )


def test_finetune__cached__one_view_in_float32_gives_the_losses_of_images(pets: Path, cache_dir: Path) -> None:
    expected = finetune(pets, **TRAINED, augment="none", out="images.safetensors")
    lines: list[str] = []
    found = finetune(
        pets, **TRAINED, cached=True, views=1, storage_dtype="float32", cache_dir=cache_dir / "exact",
        out="cached.safetensors", on_line=lines.append,
    )  # fmt: skip
    assert "layer3 256x14x14: 16 rows of " in lines[0]
    losses = [[epoch.train_loss for epoch in outcome.epochs] for outcome in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found.reported is not None
    assert expected.reported is not None
    assert found.reported.log_loss == pytest.approx(expected.reported.log_loss, rel=1e-5)
    assert found.extraction is not None
    assert (found.extraction["images"], found.extraction["is_from_this_run"]) == (16, True)
    # A network as ever, that labels images.
    labelled = predict(found.model, str(pets), device="cpu")
    assert labelled.n_images == 16


@pytest.fixture(scope="module")
def outcome(pets: Path, layer3: Extraction, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOutcome:
    out = tmp_path_factory.mktemp("models") / "m.safetensors"
    return finetune(pets, **TRAINED, cached=True, cache_dir=layer3.cache.parent, out=out)


def test_finetune__cached__reuses_what_is_there_and_says_what_it_took(
    layer3: Extraction, outcome: FinetuneOutcome, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(json.dumps(outcome.to_json()))
    assert document["extraction"]["cache"] == str(layer3.cache)
    assert document["extraction"]["images"] == 32
    assert document["extraction"]["seconds"] == layer3.record["seconds"]
    assert {"read", "step", "evaluate", "total"} <= document["seconds"].keys()
    assert "decode" not in document["seconds"]
    assert document["backbone_passes"] == 2 * 12 + 4  # of layer4; those of the frozen part are the extraction's
    assert load_model(outcome.model).head.chosen["cached"] == "layer3 256x14x14, float16, 2 views"
    assert finish(outcome, as_json=False) == 0
    printed = capsys.readouterr().out
    seconds = f"{layer3.record['seconds']:.1f}"
    assert f"the activations before them took {seconds} s and 32 passes, in {layer3.cache}" in printed


def test_finetune__cached__a_bad_image_is_left_out(draw_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)])
    (photos / "cat" / "2.png").write_bytes(b"no image")
    result = finetune(photos, **TRAINED, cached=True, cache_dir=tmp_path / "cache", on_bad="skip", out="m.safetensors")
    assert [item.path for item in result.bad] == ["cat/2.png"]
    assert result.n_train == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"unfreeze": "all"}, "--cached: --unfreeze all trains from the first stage on.*such as --unfreeze layer4"),
        ({"unfreeze": "none"}, "--cached: with --unfreeze none the head alone trains; tlc train-head does that in sec"),
        (
            {"augment": "trivial"},
            "--cached: --augment trivial is of images, and none is read; cache more --views in it",
        ),
        ({"crop_area": 0.9}, "--crop-area 0.9: is of images, and with --cached none is read; leave it out"),
        ({"cached": False, "views": 2}, "--views 2: is of cached activations; pass --cached as well, or leave it out"),
        ({"cached": False, "max_bytes": "1GB"}, "--max-bytes 1GB: is of cached activations; pass --cached"),
        ({"max_bytes": "10kB"}, "layer3 256x14x14: 16 rows .* more than --max-bytes 10.0 kB"),
    ],
)
def test_finetune__cached__words_that_do_not_go_together(
    pets: Path, tmp_path: Path, words: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(pets, **{**TRAINED, "cached": True, "cache_dir": tmp_path, **words})
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").iterdir())


def test_compare__partial_is_finetune_with_its_last_stage_cached(pets: Path, layer3: Extraction) -> None:
    given: dict[str, Any] = {"weights": "random", "device": "cpu", "cache_dir": layer3.cache.parent}
    result = compare(pets, strategies="logistic,partial", views=2, epochs=2, engine="eager", **given)
    logistic, partial = (entry.first for entry in result.summary.entries)
    assert partial.strategy == "partial"
    same = {name: value for name, value in TRAINED.items() if name == "unfreeze"}
    alone = finetune(pets, **given, **same, cached=True, epochs=2, out="m.safetensors")
    assert alone.reported is not None
    assert float(partial.is_right.mean()) == alone.reported.accuracy
    assert partial.chosen["by_epoch"][1]["train_loss"] == alone.epochs[1].train_loss
    assert partial.extraction is not None
    extract = layer3.record["seconds"]
    assert partial.seconds.stages["extract"] == pytest.approx(extract)
    assert partial.seconds.first == pytest.approx(extract + partial.seconds.again)
    assert partial.backbone_passes == 32 + 2 * 12 + 4
    assert logistic.seconds.stages["extract"] != partial.seconds.stages["extract"]
    alone_partial = replace(result, summary=replace(result.summary, entries=result.summary.entries[1:]))
    assert alone_partial.next_command == (
        *("tlc", "finetune", str(pets), "--backbone", "resnet18", "--weights", "random"),
        *("--unfreeze", "layer4", "--cached", "--cache-dir", str(layer3.cache.parent), "--epochs", "2"),
    )


def test_frozen_part__is_what_the_cache_is_of(layer3: Extraction) -> None:
    part = frozen_part(load_backbone("resnet18", weights="random"), "layer3")
    spec = layer3.open().spec
    assert (spec.weights_digest, spec.boundary) == (part.weights_digest, part.boundary)
    assert replace(spec, boundary="pooled").row_shape is None
