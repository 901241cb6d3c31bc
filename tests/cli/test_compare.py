"""`tlc compare` as a person runs it: what is printed where, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_compare__table_on_stdout_and_finished_rows_on_stderr(tlc: Run, made: Path) -> None:
    ended = tlc("compare", made / "pets", "--weights=random", "--strategies=pixels-knn,knn")
    assert ended.code == 0
    assert ended.out.startswith("pets: 10 images to train on, 2 reported (val) with resnet18\n")
    lines = ended.err.splitlines()
    assert [line.split(":")[0] for line in lines if "accuracy" in line] == ["knn", "pixels-knn"]
    assert [line for line in lines if line.startswith("next: ")] == [
        f"next: tlc compare {made / 'pets'} --weights random"
    ]


def test_compare__json_is_all_that_is_on_stdout(tlc: Run, made: Path, tmp_path: Path) -> None:
    words = ("compare", made / "pets", "--strategies=pixels-knn", "--max-minutes=1")
    ended = tlc(*words, "--backbone=resnet18", "--json", "--results=out.json")
    assert ended.code == 0
    document = json.loads(ended.out)
    assert json.loads((tmp_path / "out.json").read_text()) == document
    assert [item["name"] for item in document["strategies"]] == ["pixels-knn"]
    assert ended.out.count("\n") == 1
    assert "kept from" in tlc(*words).err
    assert "kept from" not in tlc(*words, "--fresh").err


def test_compare__bad_images(tlc: Run, draw_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "pets", 5)
    (photos / "cat" / "bad.png").write_text("plain words")
    words = ("compare", photos, "--strategies=pixels-knn", "--json")
    ended = tlc(*words)
    assert ended.code == 3
    assert json.loads(ended.out)["bad"] == [{"path": "cat/bad.png", "reason": "not an image (it starts like text)"}]
    assert "cat/bad.png: not an image" in ended.err
    assert tlc(*words, "--on-bad=skip").code == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_compare__interrupted__finished_rows_are_printed_and_kept(
    start: Callable[..., subprocess.Popen[str]], tlc: Run, made: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    words = ("compare", str(made / "pets"), "--weights=random", "--epochs=500")
    # One thread: several wait for each other where cores are busy.
    process = start(*words, "--strategies=pixels-knn,finetune", OMP_NUM_THREADS="1")
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("finetune: about"):
            break
    time.sleep(0.5)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "not finished: finetune." in err
    assert any(line.split()[:1] == ["pixels-knn"] for line in err.splitlines())
    assert "next:" not in err
    assert len(list((tmp_path / "cache" / "results").glob("*.safetensors"))) == 1
    assert "kept from" in tlc(*words, "--strategies=pixels-knn").err
