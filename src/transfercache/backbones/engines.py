"""Engines run a backbone over batches of pixels; in float32 every engine gives the same features within 1e-4."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transfercache.backbones.devices import is_out_of_memory
from transfercache.backbones.registry import Backbone
from transfercache.errors import ResourceError
from transfercache.spec import Preprocessing

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# On a GPU one half of a batch is copied while the other is computed.
_CUDA_PIECES = 2

logger = logging.getLogger(__name__)


class EagerEngine:
    """Plain PyTorch, as it is (in float32 the engine that all others are held to) or compiled."""

    def __init__(
        self, backbone: Backbone, device: torch.device, *, compute: str = "fp32", is_compiled: bool = False
    ) -> None:
        self._preprocessing = backbone.preprocessing
        self._device = device
        self._compute = compute
        self._n_pieces = _CUDA_PIECES if device.type == "cuda" else 1
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A copy, so that the backbone stays as it was loaded. Convolutions run faster on channels-last memory, and
        # the pixels come in that order anyway.
        network = copy.deepcopy(backbone.network).eval().to(device)
        self._network = network.to(memory_format=torch.channels_last)
        self._forward = torch.compile(network, dynamic=False) if is_compiled else network

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 [B, D] for uint8 [B, H, W, 3], row by row; done when it returns.

        A batch that does not fit into the device's memory is halved until it does, which is logged, and so are those
        after it. Raises ResourceError where not even one image fits.
        """
        n_pieces = min(self._n_pieces, len(pixels))
        while (features := self._in_pieces(pixels, n_pieces)) is None:
            if n_pieces >= len(pixels):
                raise ResourceError(f"{self._device}: out of memory for a single image; choose a smaller --backbone")
            n_pieces = min(2 * n_pieces, len(pixels))
        if n_pieces > self._n_pieces:
            self._n_pieces = n_pieces
            at_once = -(-len(pixels) // n_pieces)
            logger.warning(
                "%s: out of memory for %d images; from now on %d at once", self._device, len(pixels), at_once
            )
        return features

    def _in_pieces(self, pixels: NDArray[np.uint8], n_pieces: int) -> NDArray[np.float32] | None:
        """Return the features, or None where a piece does not fit."""
        try:
            with torch.inference_mode(), full_float32(), autocast(self._compute, self._device):
                parts = [self._embed_piece(piece) for piece in np.array_split(pixels, n_pieces)]
                features: NDArray[np.float32] = torch.cat(parts).cpu().numpy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return features

    def _embed_piece(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        features: torch.Tensor = self._forward(normalise(self._on_device(pixels), self._preprocessing))
        return features.float()

    def _on_device(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        # One byte a value crosses to the device, four times less than float32. Torch warns about read-only arrays.
        batch = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        if self._copies is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._copies):
            copied = batch.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        copied.record_stream(computing)  # its memory is free when that is done, not when this function is
        return copied


def autocast(compute: str, device: torch.device) -> torch.autocast:
    """Return torch's context in which a network runs in this precision; in fp32 it does nothing.

    Sums that it leaves alone, such as a norm's, stay in float32.
    """
    return torch.autocast(device.type, dtype=_HALF.get(compute), enabled=compute in _HALF)


def normalise(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Return (x / 255 - mean) / std as float32 [B, 3, H, W] in channels-last memory, for uint8 [B, H, W, 3]."""
    mean, std = (_per_channel(values, pixels.device) for values in (preprocessing.mean, preprocessing.std))
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Kept on the device: to send them there with each batch would wait until a GPU has done all that it was given.
    with torch.inference_mode(False):  # what is made in it is of no use to training and tracing
        return torch.tensor(values, device=device).view(3, 1, 1)


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
