"""SIGKILL of a real fine-tuning anywhere, saves included; then the same command with --resume, to the same bits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest

from transfercache.models.head_file import Model, load_model

from .conftest import write_photos
from .forks import BACKBONE, Command, Ended, Forks

N_IMAGES = 64
N_EPOCHS = 3
# Twenty with --campaign.
N_KILLS = 2
# Every state that a checkpoint holds is in use.
WORDS = (
    *(f"--backbone={BACKBONE}", "--weights=random", f"--epochs={N_EPOCHS}", "--batch-size=16", "--json"),
    *("--optimizer=adamw", "--ema=0.9", "--mixup=0.2", "--augment=trivial", "--select=0.2", "--batch-norm=train"),
)
# A save's own calls take milliseconds, what lies between two saves tenths of a second.
MAX_DELAY_SECONDS = {"saving": 0.002, "anywhere": 0.2}


def _finetune(forks: Forks, data: Path, out: Path, *words: str, kill_at: int | None = None, delay: float = 0) -> Ended:
    return forks.run(Command(["finetune", str(data), *WORDS, f"--out={out}", *words], kill_at=kill_at, delay=delay))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("finetuned") / "pets", range(N_IMAGES))


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, data: Path) -> tuple[Ended, Model]:
    out = data.parent / "whole" / "m.safetensors"
    ended = _finetune(forks, data, out)
    assert ended.code == 0, ended.err
    return ended, load_model(out)


@pytest.fixture(scope="module")
def phases(figures: list[str]) -> Iterator[Counter[str]]:
    counts = Counter[str]()
    yield counts
    told = ", ".join(f"{n} {phase}" for phase, n in sorted(counts.items()))
    figures.append(f"kills of fine-tuning: {counts.total()} ({told}); the model was the same each time")


def test_finetune__killed_anywhere__ends_bit_identical(
    forks: Forks,
    data: Path,
    undisturbed: tuple[Ended, Model],
    tmp_path: Path,
    scale: int,
    phases: Counter[str],
) -> None:
    whole, expected = undisturbed
    rng = np.random.default_rng(scale)
    n_kills, number = N_KILLS * scale, 0
    while phases.total() < n_kills:
        number += 1
        out = tmp_path / f"{number}" / "m.safetensors"
        # In turns over the whole run, so that early and late epochs are met alike.
        part = np.array_split(np.arange(len(whole.calls)), n_kills)[phases.total()]
        kill_at, kind = int(rng.choice(part)), ("saving", "anywhere")[number % 2]
        what = f"number {number}, at call {kill_at} {whole.calls[kill_at]}, {kind}"
        ended = _finetune(forks, data, out, kill_at=kill_at, delay=rng.uniform(0, MAX_DELAY_SECONDS[kind]))
        if ended.code == 0:  # it was over before the kill came
            continue
        assert (ended.code, ended.out) == (-SIGKILL, ""), what
        phases[_phase(out)] += 1
        again = _finetune(forks, data, out, "--resume")
        assert again.code == 0, f"{what}: {again.err}"
        _check_equal(load_model(out), expected, what)
        assert json.loads(again.out)["reported"] == json.loads(whole.out)["reported"], what
        assert [path.name for path in out.parent.glob("*checkpoints")] == [], what


def _phase(out: Path) -> str:
    """Where a kill came, by what it left."""
    folder = out.with_name(out.name + ".checkpoints")
    if list(folder.glob(".*.tmp")):
        return "while saving"
    if out.exists():
        return "after the model"
    names = sorted(path.name for path in folder.glob("*.pt"))
    return f"in epoch {int(names[-1][:6])}" if names else "before the first save"


def _check_equal(found: Model, expected: Model, what: str) -> None:
    assert found.head.weight.tobytes() == expected.head.weight.tobytes(), what
    assert found.head.bias.tobytes() == expected.head.bias.tobytes(), what
    assert found.canary_logits.tobytes() == expected.canary_logits.tobytes(), what
    assert found.head.chosen == expected.head.chosen, what
    assert found.backbone_tensors.keys() == expected.backbone_tensors.keys()
    for name, tensor in expected.backbone_tensors.items():
        assert found.backbone_tensors[name].tobytes() == tensor.tobytes(), f"{what}: {name}"
