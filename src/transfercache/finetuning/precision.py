"""What training computes in: half precision where the hardware has units for it, float32 elsewhere."""

from __future__ import annotations

import torch

from transfercache.backbones.available import bf16_units
from transfercache.backbones.choice import available_computes
from transfercache.backbones.devices import device_name
from transfercache.errors import ResourceError


def training_compute(compute: str, device: torch.device) -> str:
    """Return what `--compute` comes to on a device: fp32, bf16 or fp16.

    auto is bf16 on a CUDA device with native units for it, and on a processor with AMX (those of AVX-512 alone gain
    little); the parameters, the loss and the optimiser stay in float32. Raises ResourceError for what the device lacks.
    """
    known = available_computes(device.type)
    if compute == "auto":
        has_units = device.type == "cuda" or "AMX" in bf16_units()
        return "bf16" if "bf16" in known and has_units else "fp32"
    if compute not in known:
        raise ResourceError(f"--compute {compute}: {device_name(device)} trains in {' or '.join(known)}")
    return compute


def describe_compute(compute: str, device: torch.device) -> str:
    """Return one line for a person: the precision of training, and where."""
    exact = "" if compute == "fp32" else "; evaluation in fp32 (--compute fp32 trains in it too)"
    return f"training in {compute} on {device_name(device)}{exact}"
