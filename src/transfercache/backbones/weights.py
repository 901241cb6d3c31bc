"""Weights: read from a file that is not trusted, put into a network, and named by a digest."""

from __future__ import annotations

import hashlib
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from transfercache.errors import WeightsError
from transfercache.files import check_readable

# What training scripts wrap a state_dict in.
_WRAPPERS = ("state_dict", "model")

# A counter of training steps: no output depends on it, and files from before torch 0.4.1 lack it.
_COUNTER = "num_batches_tracked"

_N_NAMED = 3

#: What torch.load raises for bytes that are no checkpoint, depending on where they stop making sense.
REFUSALS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, 64 hex digits, of all tensors but num_batches_tracked.

    The bytes hashed are, for each tensor in ascending order of its name (by code point): name in UTF-8, one zero
    byte, dtype as torch prints it without "torch." ("float32"), one zero byte, the dimensions in decimal joined by
    commas ("64,3,7,7"; empty for a scalar), one zero byte, then the elements in row-major order, little-endian.
    Independent of device, memory format and torch's version.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not _is_counter(name):
            tensor = tensors[name]
            shape = ",".join(map(str, tensor.shape))
            digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
            digest.update(_little_endian(tensor))
    return digest.hexdigest()


def _little_endian(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    octets = flat.view(torch.uint8).reshape(-1, flat.element_size()).numpy()  # uint8 [elements, bytes of each]
    ordered = octets if sys.byteorder == "little" else octets[:, ::-1]
    return np.ascontiguousarray(ordered).reshape(-1).data


def _is_counter(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == _COUNTER


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw torch's random numbers, on the CPU and on `device`, from `seed` inside the block.

    Every global generator is left as it was.
    """
    if device is None or device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            yield
        return
    accelerators = list(range(torch.get_device_module(device).device_count()))
    with torch.random.fork_rng(devices=accelerators, device_type=device.type):
        torch.manual_seed(seed)
        yield


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or a .pth that holds tensors alone, as name -> tensor on the CPU.

    A state_dict wrapped as {"state_dict": ...} or {"model": ...} and DataParallel's prefix "module." are undone.
    Raises WeightsError where the file is missing, would run code when loaded, or holds no state_dict, ResourceError
    where it cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; --weights takes DEFAULT, random, or a .pth or .safetensors file")
    check_readable(path)
    state = _unwrapped(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path))
    if not _is_state_dict(state):
        raise WeightsError(f"{path}: holds no state_dict (name -> tensor); save model.state_dict() and pass that file")
    consume_prefix_in_state_dict_if_present(state, "module.")  # of DataParallel
    named: dict[str, torch.Tensor] = state
    return named


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())


def _unwrapped(content: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable .safetensors file ({_first_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what loads is fine, the rest is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except REFUSALS as error:
        raise WeightsError(
            f"{path}: not a file of weights alone, or torn (torch.load with weights_only=True refuses it); "
            "save model.state_dict() and pass that file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], *, head_path: str, what: str) -> bool:
    """Copy `state` into `network`; return whether it held the head too, with the network's own number of classes.

    The head is not part of any embedding, so a file without one, or with another number of classes, is as good.
    Raises WeightsError, `what` naming the source, for missing and unexpected names, other shapes, NaN and infinity.
    """
    own = network.state_dict()
    in_head = {name for name in own if name.startswith(f"{head_path}.")}
    has_head = bool(in_head) and all(name in state and state[name].shape == own[name].shape for name in in_head)
    given = OrderedDict((name, state[name]) for name in state if has_head or not name.startswith(f"{head_path}."))
    _check_names(own, given, optional=in_head, what=what)
    for name, tensor in given.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{what}: damaged: {name} is not finite (NaN or infinity); get the file again")
    # Torch reads versions of layers from here; a .safetensors file has none, and the names were just checked.
    given._metadata = own._metadata  # type: ignore[attr-defined]  # where torch keeps it
    network.load_state_dict(given, strict=False)
    return has_head


def _check_names(
    own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], *, optional: Collection[str], what: str
) -> None:
    found = {
        "missing": [name for name in own if name not in given and name not in optional and not _is_counter(name)],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [name for name in given if name in own and given[name].shape != own[name].shape],
    }
    parts = [f"{len(names)} {kind} ({_shortened(names)})" for kind, names in found.items() if names]
    if parts:
        raise WeightsError(
            f"{what}: weights of another architecture: {'; '.join(parts)}; pass --backbone as it was trained"
        )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_N_NAMED]) + (", ..." if len(names) > _N_NAMED else "")
