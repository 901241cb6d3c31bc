from __future__ import annotations

import math
from typing import Any

import pytest

from transfercache.errors import UsageError
from transfercache.finetuning.options import FinetuneOptions


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "cosin"}, r"--schedule cosin: must be cosine or constant \(did you mean cosine\?\)"),
        ({"batch_norm": "frozn"}, r"--batch-norm frozn: must be frozen or train \(did you mean frozen\?\)"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"workers": -1}, "--workers -1: must be at least 1"),
        (
            {"lr_backbone": 0.0},
            "--lr-backbone 0.0: must be a positive number; to train the head alone: --unfreeze none",
        ),
        ({"lr_head": math.nan}, "--lr-head nan: must be a positive number"),
        ({"optimizer": "adam"}, r"--optimizer adam: must be sgd or adamw \(did you mean adamw\?\)"),
        ({"augment": "trivia"}, r"--augment trivia: must be crop or trivial or none \(did you mean trivial\?\)"),
        ({"compute": "bf15"}, r"--compute bf15: must be auto or fp32 or bf16 or fp16"),
        ({"lr_decay": 1.5}, "--lr-decay 1.5: must lie above 0 and up to 1"),
        ({"crop_area": 0.0}, "--crop-area 0.0: must lie above 0 and up to 1, the whole image"),
        ({"warmup": 1.0}, "--warmup 1.0: must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "--label-smoothing -0.1: must be at least 0 and below 1"),
        ({"mixup": -1.0}, "--mixup -1.0: must be a number that is not negative"),
        ({"weight_decay": math.inf}, "--weight-decay inf: must be a number that is not negative"),
        ({"ema": 1.0}, "--ema 1.0: must be none, or a decay between 0 and 1 such as 0.99"),
        ({"patience": 2}, "--patience 2: needs rows to judge by; pass --select as well"),
        ({"patience": 0, "select": 0.2}, "--patience 0: must be at least 1"),
        ({"select": 1.0}, "--select 1.0: must be none, or a share of the training rows between 0 and 1"),
    ],
)
def test_options__a_setting_is_off(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(**setting)


def test_learning_rates__unset_are_scaled_with_the_batch() -> None:
    assert FinetuneOptions(batch_size=4).learning_rates() == {"backbone": 1e-4, "head": 1e-3}
    assert FinetuneOptions(batch_size=32).learning_rates() == pytest.approx({"backbone": 8e-4, "head": 8e-3})


def test_learning_rates__given_are_used_as_they_are() -> None:
    options = FinetuneOptions(batch_size=64, lr_backbone=3e-5)
    assert options.learning_rates() == pytest.approx({"backbone": 3e-5, "head": 16e-3})


def test_learning_rates__adamw_has_its_own_scaled_with_the_root_of_the_batch() -> None:
    assert FinetuneOptions(optimizer="adamw").learning_rates() == pytest.approx({"backbone": 2e-4, "head": 4e-3})
    large = FinetuneOptions(optimizer="adamw", batch_size=128)
    assert large.learning_rates() == pytest.approx({"backbone": 4e-4, "head": 8e-3})


def test_learning_rates__a_trained_head_is_not_moved_faster_than_the_backbone() -> None:
    assert FinetuneOptions(has_head=True).learning_rates() == pytest.approx({"backbone": 2e-4, "head": 2e-4})
    given = FinetuneOptions(has_head=True, lr_head=0.1)
    assert given.learning_rates() == pytest.approx({"backbone": 2e-4, "head": 0.1})


def test_decay__is_the_optimisers_unless_given() -> None:
    assert [FinetuneOptions(optimizer=name).decay() for name in ("sgd", "adamw")] == [0.0, 0.01]
    assert FinetuneOptions(optimizer="adamw", weight_decay=0.0).decay() == 0.0
