"""Everything that is wrong with data, weights, caches and models: exit code and message, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision

from transfercache.cache.reader import open_cache

Run = Callable[..., Any]


def _cache_of(made: Path) -> Path:
    (folder,) = (made / "cache").iterdir()
    return folder


def _refused(tlc: Run, *words: str | Path, code: int) -> str:
    """The one line of a command that ends with `code`, its stdout being empty."""
    ended = tlc(*words)
    assert (ended.code, ended.out) == (code, ""), ended
    (line,) = _after_the_engine(ended.err)
    return line


def _after_the_engine(err: str) -> list[str]:
    """The lines of stderr, without the first where it says what computes."""
    lines = err.splitlines()
    return lines[1:] if lines[0].startswith(("engine ", "training in ")) else lines


# --- data


def test_empty_folder(tlc: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = _refused(tlc, "extract-features", "empty", "--weights=random", code=3)
    assert line.startswith(f"tlc: {tmp_path}/empty: no image in it (looked for .jpg .jpeg .png")
    assert line.endswith("give a folder with images, or with one folder of images per class")


def test_folder_without_an_image__names_what_is_there(tlc: Run, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("a")
    line = _refused(tlc, "extract-features", "notes", "--weights=random", code=3)
    assert "; 1 other files, such as a.txt)" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\n", "has no column 'path' (its columns: 'file', 'label'); name it in the first line"),
        (
            "path,label\nnone.png,x\n",
            "line 2: 'none.png' does not exist, nor does any other file that it lists; paths are relative to ",
        ),
        ("path,label\n", "no row below the header; add one line per image"),
        ("path,label\na.png,x,y\n", "line 2 has 3 values, the header 2; put quotes around values that hold commas"),
        (
            "path,label,split\na.png,x,trian\n",
            "line 2: split 'trian' is none of train, val, test (did you mean train?)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["extract-features", "finetune"])
def test_csv_that_is_off(tlc: Run, tmp_path: Path, text: str, message: str, command: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "rows.csv").write_text(text)
    line = _refused(tlc, command, "rows.csv", "--weights=random", code=3)
    assert line.startswith(f"tlc: {tmp_path}/rows.csv: {message}")


def test_csv_without_labels__is_extracted_and_cannot_be_trained_on(tlc: Run, made: Path, tmp_path: Path) -> None:
    for i in range(3):
        shutil.copy(made / f"pets/cat/{i:02}.png", tmp_path / f"{i}.png")
    (tmp_path / "rows.csv").write_text("path\n0.png\n1.png\n2.png\n")
    ended = tlc("extract-features", "rows.csv", "--weights=random", "--json")
    assert ended.code == 0
    cache = json.loads(ended.out)["cache"]
    message = (
        "fewer than two classes with training images (none has any); "
        "add images of another class, or label some with --labels"
    )
    assert _refused(tlc, "train-head", cache, code=3) == f"tlc: {cache}: {message}"
    assert _refused(tlc, "finetune", "rows.csv", "--weights=random", code=3) == f"tlc: rows.csv: {message}"


def test_csv_without_training_rows__is_named_with_the_splits_that_its_labels_are_in(
    tlc: Run, made: Path, tmp_path: Path
) -> None:
    rows = [f"{path},{path.parent.name},test\n" for path in sorted((made / "pets").rglob("*.png"))]
    (tmp_path / "rows.csv").write_text("path,label,split\n" + "".join(rows))
    message = "fewer than two classes with training images (all labelled ones are in {}); give some the split train"
    for command in (("compare", "--strategies=pixels-knn"), ("finetune", "--weights=random")):
        assert _refused(tlc, *command, "rows.csv", code=3) == f"tlc: rows.csv: {message.format('test')}"
    (tmp_path / "rows.csv").write_text("path,label,split\n" + rows[0].replace(",test", ",val") + "".join(rows[1:]))
    line = _refused(tlc, "finetune", "./rows.csv", "--weights=random", code=3)
    assert line == f"tlc: ./rows.csv: {message.format('val and test')}"
    (tmp_path / "rows.csv").write_text("path,label,split\n" + "".join(rows).replace(",test", ",train"))
    line = _refused(tlc, "compare", "rows.csv", "--strategies=pixels-knn", code=3)
    assert line == (
        "tlc: rows.csv: no labelled image is held out, so nothing can be compared; "
        "give some the split val or test, or a larger --val-fraction"
    )


def test_one_class(tlc: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pets/cat", tmp_path / "pets/cat")
    ended = tlc("extract-features", "pets", "--weights=random", "--json")
    assert ended.code == 0
    cache = json.loads(ended.out)["cache"]
    for words in (("train-head", cache), ("finetune", "pets", "--weights=random")):
        line = _refused(tlc, *words, code=3)
        assert "fewer than two classes with training images (only 'cat' has any)" in line


@pytest.fixture
def partly_bad(made: Path, tmp_path: Path) -> Path:
    """pets/ with a text file called .jpg, a truncated image and a link to nothing."""
    folder = tmp_path / "pets"
    shutil.copytree(made / "pets", folder)
    (folder / "cat/text.jpg").write_text("<!DOCTYPE html><html>404</html>")
    data = (folder / "dog/00.png").read_bytes()
    (folder / "dog/short.png").write_bytes(data[: len(data) // 2])
    (folder / "dog/link.png").symlink_to("nowhere.png")
    return folder


BAD = [
    {"path": "cat/text.jpg", "reason": "not an image (it starts like HTML)"},
    {"path": "dog/link.png", "reason": "cannot be read (No such file or directory)"},
    {"path": "dog/short.png", "reason": "truncated"},
]


def test_unreadable_images__are_listed_and_the_rest_is_done(tlc: Run, partly_bad: Path) -> None:
    ended = tlc("extract-features", "pets", "--weights=random", "--json")
    assert ended.code == 3
    document = json.loads(ended.out)
    assert (document["rows"], document["computed"], document["bad"]) == (15, 12, BAD)
    assert [line for line in _after_the_engine(ended.err) if not line.startswith("next: ")] == [
        *(f"tlc: {item['path']}: {item['reason']}" for item in BAD),
        "tlc: 3 of 15 images are unreadable; all others are done and kept: mend or remove those, or pass --on-bad skip",
    ]
    # The cache is there, for heads and for a rerun.
    assert tlc("train-head", document["cache"], "--C=1").code == 0
    again = tlc("extract-features", "pets", "--weights=random", "--json", "--on-bad=skip")
    assert again.code == 0
    assert {**json.loads(again.out), "seconds": 0} == {
        **document,
        "computed": 0,
        "reused": 12,
        "seconds": 0,
        "images_per_second": None,
    }
    assert "pass --on-bad" not in again.err


def test_unreadable_images__are_predicted_as_such(tlc: Run, made: Path, partly_bad: Path, tmp_path: Path) -> None:
    head = made / "head.safetensors"
    ended = tlc("predict", head, "pets", "--json")
    assert ended.code == 3
    images = json.loads(ended.out)
    assert [image for image in images if image["label"] is None] == [
        {"path": item["path"], "label": None, "reason": item["reason"]} for item in BAD
    ]
    assert len(images) == 15
    ended = tlc("predict", head, "pets", "--out=all.csv", "--on-bad=skip")
    assert (ended.code, ended.out) == (0, "all.csv: 12 images\n")
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == "path,label,probability,reason,label_2,probability_2"
    assert lines[7] == "cat/text.jpg,,,not an image (it starts like HTML),,"
    assert len(lines) == 16


def test_unreadable_images__are_left_out_of_fine_tuning(tlc: Run, partly_bad: Path) -> None:
    words = ("finetune", "pets", "--weights=random", "--epochs=1", "--unfreeze=none", "--json")
    ended = tlc(*words)
    assert ended.code == 3
    document = json.loads(ended.out)
    assert document["bad"] == BAD
    assert Path(document["model"]).is_file()
    assert sum(item["n_train"] for item in document["reported"]["per_class"]) == document["n_train"]
    assert f"next: tlc predict {document['model']} pets\n" in ended.err
    assert "images cannot be read and are left out" in ended.err.splitlines()[1]  # the first epoch's line


def test_no_readable_image(tlc: Run, tmp_path: Path) -> None:
    (tmp_path / "pets/cat").mkdir(parents=True)
    for i in range(2):
        (tmp_path / f"pets/cat/{i}.jpg").write_text("text")
    ended = tlc("extract-features", "pets", "--weights=random")
    assert (ended.code, ended.out) == (3, "")
    assert _after_the_engine(ended.err) == [
        "tlc: cat/0.jpg: not an image (it starts like text); and no other image of pets is readable"
    ]


@pytest.mark.parametrize("solver", ["logistic", "knn"])
def test_short_classes__are_warned_of_by_name(tlc: Run, draw_photos: Any, tmp_path: Path, solver: str) -> None:
    draw_photos(tmp_path / "pets/train", 3, class_names=("bird", "cat", "dog"))
    draw_photos(tmp_path / "pets/val", 4, class_names=("bird", "cat", "fish"))
    (tmp_path / "pets/train/newt").mkdir()
    # Different images of the same classes: val's are not train's.
    shutil.rmtree(tmp_path / "pets/val/bird")
    ended = tlc("extract-features", "pets", "--weights=random", "--json")
    assert ended.code == 0
    ended = tlc("train-head", json.loads(ended.out)["cache"], f"--solver={solver}", "--json")
    assert ended.code == 0
    warnings = [line for line in ended.err.splitlines() if line.startswith("tlc: ")]
    assert "tlc: class 'newt' has no image" in warnings
    assert "tlc: class 'bird' has no val image: its recall is unknown" in warnings
    assert (
        "tlc: class 'fish' has no training image: its 4 images in val cannot be right, and each counts as wrong"
        in warnings
    )
    assert any(
        line.startswith("tlc: class 'dog' has 3 training images") and "fewer than 5 folds" in line for line in warnings
    )
    reported = json.loads(ended.out)["reported"]
    by_name = {item["class"]: item for item in reported["per_class"]}
    assert reported["n"] == 8
    assert (by_name["fish"]["recall"], by_name["bird"]["recall"]) == (0.0, None)


def test_labels__of_an_unknown_path_or_class(tlc: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "fixes.csv").write_text("path,label\ncat/0.png,dog\n")
    line = _refused(tlc, "train-head", _cache_of(made), "--labels=fixes.csv", code=3)
    assert line.startswith("tlc: fixes.csv: line 2 names 'cat/0.png', which is not in the data (did you mean cat/0")
    (tmp_path / "fixes.csv").write_text("path,label\ncat/00.png,dgo\n")
    line = _refused(tlc, "train-head", _cache_of(made), "--labels=fixes.csv", code=3)
    assert "has the label 'dgo', which is no class of the data (did you mean dog?); its classes: cat, dog" in line


def test_labels__may_name_images_that_are_bad(tlc: Run, partly_bad: Path, tmp_path: Path) -> None:
    cache = json.loads(tlc("extract-features", "pets", "--weights=random", "--json").out)["cache"]
    (tmp_path / "fixes.csv").write_text("path,label\ncat/text.jpg,dog\ncat/00.png,dog\n")
    ended = tlc("train-head", cache, "--labels=fixes.csv", "--C=1", "--json")
    assert ended.code == 0
    by_name = {item["class"]: item for item in json.loads(ended.out)["reported"]["per_class"]}
    n = {name: item["n"] + item["n_train"] for name, item in by_name.items()}
    assert n == {"cat": 5, "dog": 7}


# --- backbones and weights


def test_unknown_backbone(tlc: Run, made: Path) -> None:
    line = _refused(tlc, "extract-features", made / "pets", "--backbone=resnet81", code=2)
    assert line.startswith("tlc: unknown backbone 'resnet81' (did you mean resnet18")


def test_weights_of_another_architecture(tlc: Run, made: Path, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    line = _refused(tlc, "extract-features", made / "pets", "--backbone=resnet34", "--weights=r18.pth", code=5)
    assert line.startswith(
        f"tlc: {tmp_path}/r18.pth as resnet34: weights of another architecture: 80 missing (layer1.2"
    )
    assert not (tmp_path / "cache").exists()


def test_weights_that_are_not_there(tlc: Run, made: Path, tmp_path: Path) -> None:
    line = _refused(tlc, "extract-features", made / "pets", "--weights=none.pth", code=5)
    assert line == (
        f"tlc: {tmp_path}/none.pth: no such file; --weights takes DEFAULT, random, or a .pth or .safetensors file"
    )


def test_weights_with_a_nan(tlc: Run, made: Path, tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer4.1.conv2.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    line = _refused(tlc, "extract-features", made / "pets", "--weights=nan.pth", code=5)
    assert line == (
        f"tlc: {tmp_path}/nan.pth as resnet18: damaged: layer4.1.conv2.weight is not finite (NaN or infinity); "
        "get the file again"
    )
    assert not (tmp_path / "cache").exists()


def test_device_that_is_absent(tlc: Run, made: Path) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    line = _refused(tlc, "extract-features", made / "pets", "--weights=random", "--device=mps", code=6)
    assert line.endswith("sees no mps device on this machine; pass --device auto")


@pytest.mark.parametrize("command", ["train-head", "finetune"])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "folder: cannot be written (Is a directory); choose another path"),
        ("taken/model", "taken/model: cannot be written ("),
    ],
)
def test_out_that_cannot_be_written__is_refused_before_training(
    tlc: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, out: str, message: str
) -> None:
    def training(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("transfercache.commands.train.fit_head", training)
    monkeypatch.setattr("transfercache.commands.finetune.train", training)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").touch()
    data = (_cache_of(made),) if command == "train-head" else (made / "pets", "--weights=random")
    line = _refused(tlc, command, *data, "--out", out, code=6)
    assert line.startswith(f"tlc: {message}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("extract-features", "--engine=eager"), "out of memory for a single image; choose a smaller --backbone"),
        (("finetune",), "out of memory for a batch of images; give a smaller --batch-size"),
    ],
)
def test_batch_that_does_not_fit_into_memory(
    tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    for module in ("backbones.engines", "finetuning.loop"):
        monkeypatch.setattr(f"transfercache.{module}.normalise", refuse)
    found = _refused(tlc, *words, made / "pets", "--weights=random", "--device=cpu", code=6)
    assert found == f"tlc: cpu: {line}"


# --- caches and models


def test_no_cache_of_the_data__names_the_command_that_makes_it(tlc: Run, made: Path) -> None:
    line = _refused(tlc, "train-head", made / "pets", "--weights=random", code=3)
    assert line == (
        f"tlc: {made}/pets: no cache of it for resnet18 under cache; "
        f"make it with: tlc extract-features {made}/pets --backbone resnet18 --weights random"
    )
    line = _refused(tlc, "train-head", made / "pets", "--weights=random", "--cache-dir=none yet", code=3)
    assert line.endswith(
        f"tlc extract-features {made}/pets --backbone resnet18 --weights random --cache-dir 'none yet'"
    )


@pytest.mark.parametrize("change", ["added", "removed", "moved", "resized", "touched", "class"])
def test_data_that_has_changed_since__names_the_command_that_takes_it_in(
    tlc: Run, made: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(made / "pets", tmp_path / "pets")
    a_day_ago = time.time() - 86400
    for path in (tmp_path / "pets").rglob("*.png"):
        os.utime(path, (a_day_ago, a_day_ago))
    words = ("--weights=random", "--backbone=mobilenet_v3_small", "--cache-dir=here")
    assert tlc("extract-features", "pets", *words).code == 0
    assert tlc("train-head", "pets", *words, "--C=1").code == 0
    first = tmp_path / "pets/cat/00.png"
    if change == "added":
        shutil.copy(first, tmp_path / "pets/cat/99.png")
    elif change == "removed":
        first.unlink()
    elif change == "moved":
        first.rename(tmp_path / "pets/dog/99.png")
    elif change == "resized":
        first.write_bytes(first.read_bytes() + b"more")
        os.utime(first, (a_day_ago, a_day_ago))
    elif change == "touched":
        os.utime(first)
    else:
        (tmp_path / "pets/newt").mkdir()
    line = _refused(tlc, "train-head", "pets", *words, "--C=1", code=3)
    (cache,) = (tmp_path / "here").iterdir()
    command = "tlc extract-features pets --backbone mobilenet_v3_small --weights random --cache-dir here"
    assert line == f"tlc: pets: has changed since here/{cache.name} was made; bring that up to date: {command}"
    assert tlc(*command.split()[1:]).code == 0
    assert tlc("train-head", "pets", *words, "--C=1").code == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--solver=linear", "--C=auto"), "--C belongs to --solver logistic, ridge, sklearn, and linear has none"),
        (("--solver=knn", "--C=1"), "--C belongs to --solver logistic, ridge, sklearn, and knn has none"),
        (("--solver=knn", "--class-weight=none"), "--class-weight belongs to --solver logistic, ridge, sklearn"),
        (("--solver=knn", "--optimizer=lbfgs"), "--optimizer belongs to --solver linear, and knn has none"),
        (("--optimizer=adamw",), "--optimizer belongs to --solver linear, and logistic has none"),
    ],
)
def test_setting_of_another_solver(tlc: Run, made: Path, words: tuple[str, ...], line: str) -> None:
    assert _refused(tlc, "train-head", _cache_of(made), *words, code=2).startswith(f"tlc: {line}")


def test_split_of_data_that_gives_its_own(tlc: Run, draw_photos: Any, tmp_path: Path) -> None:
    draw_photos(tmp_path / "pets/train", 3)
    draw_photos(tmp_path / "pets/val", 2, class_names=("cat", "dog"))
    words = ("pets", "--weights=random", "--backbone=mobilenet_v3_small", "--json")
    cache = json.loads(tlc("extract-features", *words).out)["cache"]
    for flag in ("--split-seed=0", "--val-fraction=0.5"):
        line = _refused(tlc, "train-head", cache, flag, code=2)
        name = flag.partition("=")[0]
        assert line == f"tlc: {name}: the data of {cache} gives its own split, which stays; leave the flag out"


def test_data_of_a_cache__is_as_good_as_the_cache(tlc: Run, made: Path) -> None:
    words = ("train-head", made / "pets", "--weights=random", "--cache-dir", made / "cache", "--C=1", "--json")
    document, direct = (json.loads(tlc(*w).out) for w in (words, ("train-head", _cache_of(made), "--C=1", "--json")))
    assert document["reported"] == direct["reported"]


def test_torn_catalogue(tlc: Run, cache: Path) -> None:
    data = (cache / "catalogue.json").read_bytes()
    (cache / "catalogue.json").write_bytes(data[:-40])
    for words in (("train-head", cache), ("predict", cache.parent / "x", cache)):
        line = _refused(tlc, *words, code=4)
    line = _refused(tlc, "train-head", cache, code=4)
    assert line.startswith(f"tlc: {cache}/catalogue.json: ")
    assert "tlc extract-features DATA" in line


def test_flipped_bit_in_a_shard(tlc: Run, cache: Path) -> None:
    shard = cache / "shard-00000.h5"
    entry = open_cache(cache).catalogue.shards[0]
    data = bytearray(shard.read_bytes())
    data[entry.features.offset + 100] ^= 4
    shard.chmod(0o644)
    shard.write_bytes(data)
    line = _refused(tlc, "train-head", cache, code=4)
    assert line.startswith(f"tlc: {shard}: row 0 fails its checksum; mend it with: tlc extract-features ")


def test_cache_of_another_spec__given_to_predict(tlc: Run, made: Path, tmp_path: Path) -> None:
    words = ("extract-features", made / "pets", "--backbone=mobilenet_v3_small", "--weights=random", "--json")
    other = json.loads(tlc(*words).out)["cache"]
    line = _refused(tlc, "predict", made / "head.safetensors", other, code=4)
    assert line.startswith(
        f"tlc: {other}: not of the spec that {made}/head.safetensors was trained on "
        "(backbone mobilenet_v3_small against resnet18, weights_digest "
    )


@pytest.mark.parametrize("content", [b"", b"no model", b"\xff" * 100])
def test_model_that_is_none(tlc: Run, made: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "head.safetensors").write_bytes(content)
    line = _refused(tlc, "predict", "head.safetensors", made / "pets", code=4)
    assert line.startswith("tlc: head.safetensors: not a model of tlc (")


def test_model_with_changed_weights(tlc: Run, made: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(made / "head.safetensors", framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["head.weight"] = tensors["head.weight"][::-1].copy()
    safetensors.numpy.save_file(tensors, tmp_path / "head.safetensors", metadata)
    for data in (made / "pets", _cache_of(made)):
        line = _refused(tlc, "predict", "head.safetensors", data, code=4)
        assert line.startswith("tlc: head.safetensors: on its own test images this model's logits differ from those ")
    tensors["head.weight"] = np.ones((2, 7), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "head.safetensors", metadata)
    for data in (made / "pets", _cache_of(made)):
        line = _refused(tlc, "predict", "head.safetensors", data, code=4)
        assert line.startswith("tlc: head.safetensors: its head takes 7 features, but its backbone gives 512")


def test_file_to_predict_that_is_not_there(tlc: Run, made: Path) -> None:
    assert _refused(tlc, "predict", made / "head.safetensors", "none.jpg", code=3) == (
        "tlc: none.jpg: no such file or folder; check the path"
    )
    line = _refused(tlc, "predict", made / "head.safetensors", made / "pets/cat/00.png", "none.jpg", code=3)
    assert line == "tlc: none.jpg: no such file or folder; check the path"


# --- places that cannot be written


@pytest.mark.parametrize("out", ["taken/head.safetensors", "folder"])
def test_model_path_that_cannot_be_written(tlc: Run, made: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "folder").mkdir()
    line = _refused(tlc, "train-head", _cache_of(made), "--C=1", f"--out={out}", code=6)
    assert line.startswith(f"tlc: {out}: cannot be written (")


def test_predictions_path_that_cannot_be_written(tlc: Run, made: Path) -> None:
    words = ("predict", made / "head.safetensors", _cache_of(made))
    line = _refused(tlc, *words, "--out=none/all.csv", code=6)
    assert line == "tlc: none/all.csv: cannot be written (No such file or directory); choose another path"
    line = _refused(tlc, *words, "--out=all.txt", code=2)
    assert line == "tlc: --out all.txt: name a .csv or a .jsonl file"


def test_cache_folder_that_cannot_be_made(tlc: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    line = _refused(tlc, "extract-features", made / "pets", "--weights=random", "--cache-dir=taken", code=6)
    assert line.startswith("tlc: taken/pets-resnet18-pooled-")
    assert "cannot be written (Not a directory)" in line


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be searched; root may search every folder, so that it is refused here as others are."""
    folder, look = tmp_path / "closed", os.stat
    folder.mkdir()

    def refuse_below(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if folder in Path(os.path.abspath(path) if isinstance(path, (str, Path)) else "/").parents:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse_below)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("train-head", "closed/cache"),
        ("predict", "closed/head.safetensors", "pets"),
        ("cache", "list", "--cache-dir=closed/cache"),
        ("extract-features", "pets", "--weights=random", "--cache-dir=closed/cache"),
        ("extract-features", "pets", "--weights=closed/weights.pth"),
    ],
)
def test_path_below_a_folder_that_may_not_be_searched(
    tlc: Run, made: Path, tmp_path: Path, closed: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "pets").symlink_to(made / "pets")
    line = _refused(tlc, *words, code=6)
    assert line.startswith(("tlc: closed/", f"tlc: {closed}/"))
    assert line.endswith(": Permission denied; change its permissions or its folder's, or choose another path")


def test_doctor__says_that_a_folder_may_not_be_searched(
    tlc: Run, closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFERCACHE_DIR", str(closed / "cache"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    ended = tlc("doctor")
    assert ended.code == 0
    assert f"caches: {closed}/cache (cannot be written)\n" in ended.out


# --- files that cannot be read


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux alone has a file that even root cannot read")
@pytest.mark.parametrize(
    "words",
    [
        ("extract-features", "pets", "--weights={}.pth"),
        ("extract-features", "pets", "--weights={}.safetensors"),
        ("predict", "{}", "pets"),
        ("export", "{}"),
        ("finetune", "pets", "--weights=random", "--init-head={}"),
    ],
)
def test_file_that_cannot_be_read__is_not_said_to_be_damaged(
    tlc: Run, made: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    shutil.copytree(made / "pets", tmp_path / "pets")
    for suffix in ("", ".pth", ".safetensors"):
        (tmp_path / f"file{suffix}").symlink_to("/proc/self/mem")
    line = _refused(tlc, *(word.format(tmp_path / "file") for word in words), code=6)
    named = next(word for word in words if "{}" in word).rpartition("=")[2].format(tmp_path / "file")
    reason = "cannot be read (Input/output error); change its permissions, or get the file again"
    assert line == f"tlc: {named}: {reason}"


# --- words that the command line's types do not catch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--solver=logstic",), "unknown solver 'logstic' (did you mean logistic?)"),
        (("--C=much",), "--C 'much' must be a positive number, or auto"),
        (("--C=-1",), "--C -1.0 must be a positive number, or auto"),
        (("--C=nan",), "--C nan must be a positive number, or auto"),
    ],
)
def test_train_head__words_that_are_off(tlc: Run, made: Path, words: tuple[str, ...], message: str) -> None:
    assert _refused(tlc, "train-head", _cache_of(made), *words, code=2).startswith(f"tlc: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--select=half",), "--select 'half' must be none, or a number between 0 and 1"),
        (("--ema=much",), "--ema 'much' must be none, or a number between 0 and 1"),
        (("--patience=3",), "--patience 3: needs rows to judge by; pass --select as well"),
        (("--unfreeze=layer9",), ""),
        (("--lr-head=-1",), ""),
        (("--select=2",), ""),
        (("--try=lr-head",), "--try lr-head: must be an option and its values, such as lr-head=1e-3,3e-3"),
        (("--try=lr-hed=1,2",), "--try lr-hed: must be one of epochs, batch-size, unfreeze, "),
        (("--try=lr-head=1,high",), "--try lr-head=high: must be a number"),
        (("--try=warmup=0.1,1",), "--try: --warmup 1.0: must be at least 0 and below 1"),
        (("--try=lr-head=1,2", "--lr-head=3"), "--lr-head 3.0: is given and tried as well"),
    ],
)
def test_finetune__words_that_are_off(tlc: Run, made: Path, words: tuple[str, ...], message: str) -> None:
    line = _refused(tlc, "finetune", made / "pets", "--weights=random", *words, code=2)
    assert line.startswith(f"tlc: {message}")
