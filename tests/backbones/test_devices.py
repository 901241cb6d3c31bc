from __future__ import annotations

import pytest
import torch

from transfercache.backbones.devices import device_name, memory_errors, peak_memory_bytes, pick_device, synchronize
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


def test_peak_memory_bytes__grows_with_what_a_process_takes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 2**27 < before < 2**40  # torch alone takes more than a hundred megabytes
    taken = torch.ones(before // 4 + 2**24)  # as much again
    assert peak_memory_bytes(torch.device("cpu")) >= before + taken.nbytes // 4


def test_cpu__has_a_name_and_nothing_to_wait_for() -> None:
    synchronize(torch.device("cpu"))
    assert len(device_name(torch.device("cpu"))) > 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_errors__name_the_device_and_the_way_out(error: RuntimeError) -> None:
    message = "^cpu: out of memory for a batch of images; give a smaller --batch-size$"
    with pytest.raises(ResourceError, match=message), memory_errors(torch.device("cpu")):
        raise error


def test_memory_errors__of_the_allocator_of_this_machine() -> None:
    with pytest.raises(ResourceError, match="out of memory"), memory_errors(torch.device("cpu")):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_memory_errors__leave_others_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_errors(torch.device("cpu")):
        torch.ones(2, 3) @ torch.ones(2, 3)
