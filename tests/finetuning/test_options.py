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
