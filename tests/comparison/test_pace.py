from __future__ import annotations

import pytest
import torch

from transfercache.comparison import pace
from transfercache.comparison.pace import Pace, measure_pace
from transfercache.comparison.strategy import Loop, Setting, Work


def test_estimate__seconds_of_the_work() -> None:
    assert Pace(trained=0.3, forward=0.1).estimate(Work(trained=100, forward=50)) == pytest.approx(35.0)


def test_measure_pace__times_a_copy_and_leaves_no_gradients(setting: Setting) -> None:
    backbone = setting.random_backbone()
    measured = measure_pace(setting.rows.manifest, backbone, device=setting.device)
    assert measured.forward > 0
    assert measured.trained > 0
    assert all(parameter.grad is None for parameter in backbone.network.parameters())


def test_measure_pace__batches_and_memory_of_the_loop(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, bool]] = []
    monkeypatch.setattr(
        pace, "_forward", lambda network, batches: seen.extend((b.shape, b.is_contiguous()) for b in batches)
    )
    for loop in (Loop(), Loop(4, torch.contiguous_format)):
        measure_pace(setting.rows.manifest, setting.random_backbone(), device=setting.device, loop=loop)
    # Once to warm up and once timed.
    assert seen == 2 * [((8, 3, 32, 32), False)] + 4 * [((4, 3, 32, 32), True)]
