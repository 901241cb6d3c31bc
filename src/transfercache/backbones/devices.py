"""Which device computes: chosen, named, waited for."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from transfercache.environment import processor_name
from transfercache.errors import OutOfMemoryError, ResourceError, UsageError, did_you_mean

DEVICES = ("auto", "cpu", "cuda", "mps")

#: What those say that have no class of their own: the CPU's allocator (Linux, Windows), Apple's, NVIDIA's libraries.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes an NVIDIA (or ROCm) GPU, else Apple's, else the CPU.

    Raises UsageError for a name not in `DEVICES`, ResourceError for a device that torch does not see here.
    """
    if name not in DEVICES:
        raise UsageError(f"unknown device {name!r}{did_you_mean(name, DEVICES)}; known are {', '.join(DEVICES)}")
    is_present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, check in is_present.items() if check()))
    if not is_present[name]():
        raise ResourceError(f"torch {torch.__version__} sees no {name} device on this machine; pass --device auto")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next is right; a CPU never lags."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library below it, was refused memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn torch's refusal of memory for a batch into a ResourceError; every other error stays as it is."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{device}: out of memory for a batch of images; give a smaller --batch-size") from error


def device_name(device: torch.device) -> str:
    """Return what to report beside a figure: the GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {platform.machine()}"
    return processor_name()


def forget_peak_memory(device: torch.device) -> None:
    """Begin a new peak on an NVIDIA GPU; that of a process cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory taken so far: torch's tensors on an NVIDIA GPU, elsewhere all of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
