"""Which engine computes on which device in which precision: chosen once, and refused with the reason.

Torch takes seconds to import: it is loaded where it computes, or where there may be a GPU that only it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from transfercache import config
from transfercache.backbones.available import (
    COMPILE,
    EAGER,
    OPENVINO,
    auto_engine,
    bf16_units,
    is_openvino_installed,
    may_have_gpu,
)
from transfercache.backbones.known import FrozenBackbone
from transfercache.environment import n_cores, processor_name
from transfercache.errors import ResourceError, UsageError, did_you_mean
from transfercache.spec import COMPUTES

ENGINES = tuple(name for name in get_args(config.Engine) if name != "auto")


class Engine(Protocol):
    """Turns pixels into features; holds its own copy of the network on its device."""

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 [B, D] for uint8 [B, H, W, 3]."""


@dataclass(frozen=True)
class Choice:
    """An engine, a device and a precision that go together on this machine."""

    engine: str
    device: str  # cpu | cuda | mps
    compute: str

    @property
    def batch_size(self) -> int:
        """Images a batch where the user says nothing."""
        return config.CUDA_BATCH_SIZE if self.device == "cuda" else config.EXTRACT_BATCH_SIZE

    @property
    def device_name(self) -> str:
        """What to report beside a figure: the GPU's or the processor's own name."""
        return _device_name(self.device)

    def build(self, backbone: FrozenBackbone) -> Engine:
        """Return the engine for this backbone; raises ResourceError where it cannot run it."""
        if self.engine == OPENVINO:
            from transfercache.backbones.openvino_engine import OpenvinoEngine

            return OpenvinoEngine(backbone, compute=self.compute)
        from transfercache.backbones.devices import pick_device
        from transfercache.backbones.engines import EagerEngine

        is_compiled = self.engine == COMPILE
        return EagerEngine(backbone.load(), pick_device(self.device), compute=self.compute, is_compiled=is_compiled)

    def describe(self) -> str:
        """Return one line for a person: what computes, and what would be faster here."""
        cores = f", {n_cores()} cores" if self.device == "cpu" else ""
        return f"engine {self.engine} ({self.compute}) on {self.device_name}{cores}{self._hint()}"

    def _hint(self) -> str:
        if self.device != "cpu":
            return ""
        if self.compute == "bf16" and self.engine == EAGER:
            install = "" if is_openvino_installed() else f" ({_INSTALL})"
            return f"; --engine openvino{install} would be several times faster in bf16"
        advice = bf16_advice()
        return f"; {advice}" if advice and self.compute == "fp32" else ""


# Measured (docs/decisions/0011-one-cpu-engine.md): the units of AMX alone are worth a precision of their own.
_AMX_ADVICE = (
    "this processor has AMX: --compute bf16 would be several times faster, its features within 1-2 % of the largest"
)
_INSTALL = "pip install 'transfercache[openvino]'"


def bf16_advice() -> str | None:
    """Return a clause saying that `--compute bf16` would pay on this processor, or None."""
    return _AMX_ADVICE if "AMX" in bf16_units() else None


def choose_engine(engine: str = config.ENGINE, *, device: str, compute: str = config.COMPUTE) -> Choice:
    """Return what `--engine`, `--device` and `--compute` come to here; `auto` precision is fp32 everywhere.

    Raises UsageError for words that are unknown or do not go together, ResourceError for what this machine lacks.
    """
    target = _target(device)
    chosen = auto_engine(target) if engine == "auto" else engine
    _check_engine(chosen, target)
    precision = "fp32" if compute == "auto" else compute
    _check_compute(precision, target)
    return Choice(chosen, target, precision)


def _target(device: str) -> str:
    if device == "cpu" or (device == "auto" and not may_have_gpu()):
        return "cpu"
    from transfercache.backbones.devices import pick_device

    return pick_device(device).type


def _device_name(device: str) -> str:
    if device == "cpu":
        return processor_name()
    from transfercache.backbones.devices import device_name, pick_device

    return device_name(pick_device(device))


def _check_engine(engine: str, device: str) -> None:
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}{did_you_mean(engine, ENGINES)}; known are {', '.join(ENGINES)}")
    if engine == COMPILE and device != "cuda":
        raise UsageError(
            f"--engine compile: torch.compile is for NVIDIA GPUs here, and this would run on {device}; "
            "pass --engine auto"
        )
    if engine == OPENVINO and device != "cpu":
        raise UsageError(f"--engine openvino: computes on the CPU, not on {device}; pass --device cpu as well")
    if engine == OPENVINO and not is_openvino_installed():
        raise ResourceError(f"--engine openvino: it is not installed; install it with: {_INSTALL}")


def _check_compute(compute: str, device: str) -> None:
    if compute not in COMPUTES:
        raise UsageError(f"unknown precision {compute!r}; known are {', '.join(COMPUTES)}")
    if compute == "fp32":
        return
    reason = _why_not(compute, device)
    if reason is not None:
        raise ResourceError(f"--compute {compute}: {reason}; use fp32 here, whose embeddings have a cache of their own")


def _why_not(compute: str, device: str) -> str | None:
    """Return why this device does not compute in half precision, or None where it does."""
    if device == "cuda":
        import torch

        is_native = compute == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
        return None if is_native else f"{_device_name(device)} has no bfloat16 units and would imitate them slowly"
    if compute == "fp16" or device != "cpu":
        return f"it needs an NVIDIA GPU, and this is {_device_name(device)}"
    if not bf16_units():
        return f"{_device_name(device)} has no bfloat16 units (AMX or AVX-512 BF16) and would imitate them slowly"
    return None


def available_computes(device: str) -> tuple[str, ...]:
    """Return the precisions that a device computes in."""
    return tuple(name for name in COMPUTES if name == "fp32" or _why_not(name, device) is None)
