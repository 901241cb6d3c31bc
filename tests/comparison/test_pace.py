from __future__ import annotations

import pytest

from transfercache.comparison.pace import Pace, measure_pace
from transfercache.comparison.strategy import Setting, Work


def test_estimate__seconds_of_the_work() -> None:
    assert Pace(trained=0.3, forward=0.1).estimate(Work(trained=100, forward=50)) == pytest.approx(35.0)


def test_measure_pace__times_a_copy_and_leaves_no_gradients(setting: Setting) -> None:
    backbone = setting.random_backbone()
    pace = measure_pace(setting.rows.manifest, backbone, device=setting.device, workers=setting.workers)
    assert pace.forward > 0
    assert pace.trained > 0
    assert all(parameter.grad is None for parameter in backbone.network.parameters())
