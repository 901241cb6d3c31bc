from __future__ import annotations

import pytest

from transfercache.finetuning.trainer import rate_factor


def test_rate_factor__cosine_falls_from_one_to_zero() -> None:
    factors = [rate_factor("cosine", progress, warmup=0.0) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert factors == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0], abs=1e-12)


def test_rate_factor__constant() -> None:
    assert {rate_factor("constant", progress, warmup=0.0) for progress in (0.0, 0.4, 1.0)} == {1.0}


@pytest.mark.parametrize(("schedule", "half_way"), [("cosine", 0.5), ("constant", 1.0)])
def test_rate_factor__warms_up_linearly_first(schedule: str, half_way: float) -> None:
    factors = [rate_factor(schedule, progress, warmup=0.2) for progress in (0.0, 0.1, 0.2, 0.6)]
    assert factors == pytest.approx([0.1, 0.55, 1.0, half_way])
