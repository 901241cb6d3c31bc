"""What tlc runs on: the processor, its vector units, the versions that matter, and the user's folder. Torch-free."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

# Of a container, on Linux (control groups, version 2).
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "openvino",
    "torchcodec",
    "numpy",
    "scikit-learn",
    "h5py",
    "pillow",
    "transfercache",
)
# Each set of units changes what an engine does by itself, so a figure names the widest one it ran on.
_VECTOR_UNITS = (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))


def describe_environment() -> dict[str, Any]:
    """Return the machine (processor, vector units, cores, system) and the installed versions, as plain JSON."""
    return {"machine": _machine(), "versions": installed_versions()}


def installed_versions() -> dict[str, str]:
    """Return {package: version} of the packages that can change an embedding or a head; absent ones left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def processor_name() -> str:
    """Return the processor's own name."""
    return _processor()[0]


def processor_flags() -> set[str]:
    """Return what the processor can do, in Linux's own words; nothing where those cannot be read."""
    return _processor()[1]


def n_cores() -> int:
    """Return how many cores this process may use: its affinity's, and no more than a container's quota pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control groups (version 2), or "max": no quota
        quota, period = _CPU_QUOTA.read_text().split()  # microseconds of processor time in as many of the clock
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def tlc_folder() -> Path:
    """Return the user's folder (`XDG_CACHE_HOME`) of what is kept to be faster, which can be removed at any time."""
    return platformdirs.user_cache_path("transfercache")


def _machine() -> dict[str, Any]:
    processor, flags = _processor()
    return {
        "processor": processor,
        "vector_units": next((name for flag, name in _VECTOR_UNITS if flag in flags), "none known"),
        "cores": n_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> tuple[str, set[str]]:
    description = Path("/proc/cpuinfo")  # Linux; elsewhere the platform module has what there is
    if not description.exists():
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in description.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    return fields.get("model name", platform.machine()), flags
