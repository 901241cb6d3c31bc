"""Real processes, ended in the middle of an extraction or of fine-tuning; then the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.commands.extract import extract_features
from transfercache.errors import CacheError
from transfercache.models.head_file import load_model

N_IMAGES = 16
DEADLINE_SECONDS = 120

Start = Callable[..., "subprocess.Popen[str]"]


def _words(photos: Path, cache_dir: Path) -> list[str]:
    return ["extract-features", str(photos), "--weights=random", "--batch-size=2", f"--cache-dir={cache_dir}", "--json"]


def _n_held(cache_dir: Path) -> int:
    """Rows in the shard that is being written, as the next run will find them."""
    try:
        (folder,) = cache_dir.iterdir()
        return int(Store(folder).slots().valid.sum())
    except (ValueError, FileNotFoundError, CacheError):  # no folder or no catalogue yet
        return 0


def _end_in_the_middle(process: subprocess.Popen[str], cache_dir: Path, sent: signal.Signals) -> tuple[str, str]:
    """Send the signal as soon as a few rows are there, and wait for the end."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while _n_held(cache_dir) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    return process.communicate(timeout=DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, draw_photos: Callable[..., Path]) -> Path:
    """The cache of the same photographs, extracted in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    photos = draw_photos(folder / "pets", N_IMAGES // 2)
    return extract_features(photos, weights="random", batch_size=2, cache_dir=folder / "cache").cache


@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (
            signal.SIGTERM,
            143,
            "tlc: told to end (SIGTERM); what was computed is kept, and the same command goes on from there\n",
        ),
        (
            signal.SIGINT,
            130,
            "tlc: interrupted; what was computed is kept, and the same command goes on from there\n",
        ),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGINT"],
)
def test_extraction__ended_in_the_middle__goes_on_from_there(
    start: Start,
    draw_photos: Callable[..., Path],
    tmp_path: Path,
    tlc: Callable[..., Any],
    undisturbed: Path,
    sent: signal.Signals,
    code: int,
    line: str,
) -> None:
    photos, cache_dir = draw_photos(tmp_path / "pets", N_IMAGES // 2), tmp_path / "cache"
    process = start(*_words(photos, cache_dir))
    out, err = _end_in_the_middle(process, cache_dir, sent)
    assert (process.returncode, out) == (code, "")
    assert err.startswith("engine ")
    assert err.partition("\n")[2] == line
    n_held = _n_held(cache_dir)
    assert 4 <= n_held < N_IMAGES
    (folder,) = cache_dir.iterdir()
    with pytest.raises(CacheError, match="its extraction is not finished: run the same extract-features again"):
        open_cache(folder)

    again = tlc(*_words(photos, cache_dir))
    assert again.code == 0
    document = json.loads(again.out)
    assert (document["computed"], document["reused"]) == (N_IMAGES - n_held, n_held)
    features, labels = open_cache(folder).arrays()
    expected, expected_labels = open_cache(undisturbed).arrays()
    assert features.tobytes() == expected.tobytes()
    assert labels.tolist() == expected_labels.tolist()
    assert (folder / "shard-00000.h5").read_bytes() == (undisturbed / "shard-00000.h5").read_bytes()


def test_second_writer__is_told_that_another_is_at_work(
    start: Start, draw_photos: Callable[..., Path], tmp_path: Path, tlc: Callable[..., Any]
) -> None:
    photos, cache_dir = draw_photos(tmp_path / "pets", N_IMAGES // 2), tmp_path / "cache"
    process = start(*_words(photos, cache_dir))
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while _n_held(cache_dir) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        ended = tlc(*_words(photos, cache_dir))
        (folder,) = cache_dir.iterdir()
        assert (ended.code, ended.out) == (6, "")
        assert ended.err == (
            f"tlc: {folder}: another process is writing to it; wait for it to end, then run this again\n"
        )
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (signal.SIGKILL, -signal.SIGKILL, None),
        (
            signal.SIGTERM,
            143,
            "tlc: told to end (SIGTERM); its checkpoints, if any, are kept, and the same command with --resume goes on "
            "from the last one",
        ),
    ],
    ids=["SIGKILL", "SIGTERM"],
)
def test_finetune__ended_in_the_middle__goes_on_to_the_same_model(
    start: Start,
    draw_photos: Callable[..., Path],
    tmp_path: Path,
    tlc: Callable[..., Any],
    sent: signal.Signals,
    code: int,
    line: str | None,
) -> None:
    photos = draw_photos(tmp_path / "pets", 6)
    words = ["finetune", str(photos), "--weights=random", "--backbone=mobilenet_v3_small", "--epochs=4", "--json"]
    folder = tmp_path / "m.safetensors.checkpoints"
    process = start(*words, "--out=m.safetensors", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not list(folder.glob("*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, out) == (code, "")
    if line is not None:
        assert err.splitlines()[-1] == line
    assert not (tmp_path / "m.safetensors").exists()

    refused = tlc(*words, "--out=m.safetensors")
    assert refused.code == 2
    assert "holds the checkpoints of an unfinished run; go on with it by --resume" in refused.err
    again = start(*words, "--out=m.safetensors", "--resume", OMP_NUM_THREADS="1")
    whole = start(*words, "--out=whole.safetensors", OMP_NUM_THREADS="1")
    (resumed, said), (undisturbed, _) = (p.communicate(timeout=DEADLINE_SECONDS) for p in (again, whole))
    assert (again.returncode, whole.returncode) == (0, 0)
    assert "going on after " in said
    assert not folder.exists()
    found, expected = (load_model(tmp_path / f"{name}.safetensors") for name in ("m", "whole"))
    assert found.head.weight.tobytes() == expected.head.weight.tobytes()
    assert found.canary_logits.tobytes() == expected.canary_logits.tobytes()
    for name, tensor in expected.backbone_tensors.items():
        assert found.backbone_tensors[name].tobytes() == tensor.tobytes(), name
    assert found.reported == expected.reported
    losses = [[epoch["train_loss"] for epoch in json.loads(text)["epochs"]] for text in (resumed, undisturbed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_search__ended_in_the_middle__keeps_what_was_tried_and_chooses_the_same(
    start: Start, draw_photos: Callable[..., Path], tmp_path: Path, sent: signal.Signals
) -> None:
    photos = draw_photos(tmp_path / "pets", 6)
    words = ["finetune", str(photos), "--weights=random", "--backbone=mobilenet_v3_small", "--epochs=2", "--json"]
    words += ["--unfreeze=none", "--try=lr-head=1e-3,1", "--try=mixup=0,0.5"]
    folder = tmp_path / "m.safetensors.checkpoints"
    process = start(*words, "--out=m.safetensors", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not any(folder.glob("try-done-000002-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode in (-sent, 128 + sent)
    finished = torch.load(max(folder.glob("try-done-*.pt")), weights_only=True)["trials"]
    assert 2 <= len(finished) < 4

    again = start(*words, "--out=m.safetensors", "--resume", OMP_NUM_THREADS="1")
    whole = start(*words, "--out=whole.safetensors", OMP_NUM_THREADS="1")
    (resumed, said), (undisturbed, _) = (p.communicate(timeout=DEADLINE_SECONDS) for p in (again, whole))
    assert (again.returncode, whole.returncode) == (0, 0)
    tries = [line[:10] for line in said.splitlines() if line.startswith("try ")]
    assert tries == [f"try {number} of 4" for number in range(len(finished) + 1, 5)]
    found, expected = (json.loads(text)["trials"] for text in (resumed, undisturbed))
    assert [trial["seconds"] for trial in found[: len(finished)]] == [trial["seconds"] for trial in finished]
    for trial in (*found, *expected):
        del trial["seconds"]
    assert found == expected
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not folder.exists()
