from __future__ import annotations

import pytest
import torch

from transfercache.backbones.devices import device_name, pick_device, synchronize
from transfercache.errors import ResourceError, UsageError


def see(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_pick_device__auto(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, cuda=cuda, mps=mps)
    assert pick_device("auto") == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_pick_device__absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, cuda=False, mps=False)
    with pytest.raises(ResourceError, match=f"sees no {name} device on this machine; pass --device auto"):
        pick_device(name)


def test_pick_device__unknown() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'cude' \(did you mean cuda\?\)"):
        pick_device("cude")


def test_cpu__has_a_name_and_nothing_to_wait_for() -> None:
    synchronize(torch.device("cpu"))
    assert len(device_name(torch.device("cpu"))) > 3
