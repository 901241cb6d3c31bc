"""What this machine can compute with, as far as can be said without loading torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from transfercache.environment import processor_flags, tlc_folder

OPENVINO = "openvino"
EAGER = "eager"
COMPILE = "compile"

#: Of weights: the published ones, and those that seed 0 draws.
DEFAULT = "DEFAULT"
RANDOM = "random"

# What Linux has where there is a driver: NVIDIA's, NVIDIA's under Windows, AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

# As Linux names them in /proc/cpuinfo.
_BF16_UNITS = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"))


def is_openvino_installed() -> bool:
    """Whether the extra `openvino` is there; it is not loaded."""
    return find_spec(OPENVINO) is not None


def auto_engine(device: str) -> str:
    """Return the engine that `auto` takes on a device; `auto` is taken for the CPU, as only torch sees a GPU."""
    return OPENVINO if device in ("auto", "cpu") and is_openvino_installed() else EAGER


def may_have_gpu() -> bool:
    """Whether torch might see a GPU; where it cannot, nobody needs to load it to find out."""
    return not sys.platform.startswith("linux") or any(Path(file).exists() for file in _GPU_FILES)


def kept_networks() -> Path:
    """Return the folder of the networks that OpenVINO has converted."""
    return tlc_folder() / OPENVINO


def bf16_units() -> tuple[str, ...]:
    """Return the processor's units that multiply bfloat16, the fastest first; none where it has to imitate them."""
    flags = processor_flags()
    return tuple(name for flag, name in _BF16_UNITS if flag in flags)
