"""Engines run a backbone over batches of pixels; every engine gives the same features within 1e-4."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from transfercache import config
from transfercache.backbones.devices import memory_errors, synchronize
from transfercache.backbones.registry import Backbone
from transfercache.randomness import derive_rng
from transfercache.spec import Preprocessing

_N_CANARIES = 4
_CANARY_GRID = 7  # a few blobs across the image: smooth, as photographs are


class Engine(Protocol):
    """Turns pixels into features; holds its own copy of the network on its device."""

    name: str

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 [B, D] for uint8 [B, H, W, 3]."""


class EagerEngine:
    """Plain PyTorch in float32, the engine that all others are held to."""

    name = config.ENGINE

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._preprocessing = backbone.preprocessing
        self._device = device
        # A copy, so that the backbone stays as it was loaded. Convolutions run faster on channels-last memory, and
        # the pixels come in that order anyway.
        self._network = copy.deepcopy(backbone.network).eval()
        self._network.to(device).to(memory_format=torch.channels_last)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 [B, D] for uint8 [B, H, W, 3], row by row; done when it returns.

        Raises ResourceError where the batch does not fit into the device's memory.
        """
        with torch.inference_mode(), full_float32(), memory_errors(self._device):
            inputs = normalise(self._on_device(pixels), self._preprocessing)
            features = self._network(inputs).float().cpu()
            synchronize(self._device)
        array: NDArray[np.float32] = features.numpy()
        return array

    def _on_device(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        # One byte a value crosses to the device, four times less than float32. Torch warns about read-only arrays.
        batch = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch.to(self._device)


def normalise(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Return (x / 255 - mean) / std as float32 [B, 3, H, W] in channels-last memory, for uint8 [B, H, W, 3]."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(3, 1, 1)
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 and bfloat16 shortcuts off inside the block: a cache made on a GPU is the one a laptop reads."""
    switches = _precision_switches()
    before = [getattr(module, name) for module, name, _ in switches]
    try:
        for module, name, exact in switches:
            setattr(module, name, exact)
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _precision_switches() -> list[tuple[Any, str, str]]:
    backends: Any = torch.backends
    modules = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [(module, "fp32_precision", "ieee") for module in (*modules, backends.mkldnn.matmul, backends.mkldnn.conv)]


def canary_pixels(crop: int) -> NDArray[np.uint8]:
    """Return the uint8 [4, crop, crop, 3] images that tell whether a network is the one it was: fixed for ever.

    Random grids, interpolated between their points in whole numbers, so that every machine makes the same bytes.
    """
    points = _CANARY_GRID - 1
    grid = derive_rng(0, "canary").integers(0, 256, (_N_CANARIES, _CANARY_GRID, _CANARY_GRID, 3))  # int64
    position = np.arange(crop, dtype=np.int64) * points  # in units of 1 / crop of a grid cell
    cell, weight = position // crop, position % crop
    rows = grid[:, cell] * (crop - weight)[:, None, None] + grid[:, cell + 1] * weight[:, None, None]
    left, right = rows[:, :, cell], rows[:, :, cell + 1]
    images = left * (crop - weight)[:, None] + right * weight[:, None]  # int64 [4, crop, crop, 3], times crop squared
    return (images // (crop * crop)).astype(np.uint8)
