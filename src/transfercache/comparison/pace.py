"""How long a strategy will take here: a few images are timed through the network, and its work multiplied out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from transfercache import config
from transfercache.backbones.devices import memory_errors, synchronize
from transfercache.backbones.engines import autocast, full_float32, normalise
from transfercache.backbones.registry import Backbone
from transfercache.comparison.rows import load_pixels
from transfercache.comparison.strategy import DEFAULT_LOOP, Loop, Work
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.transforms import eval_pixels

#: Images timed: two of the tutorial's batches, so that one pass is soon over on two cores.
N_TIMED = 8


@dataclass(frozen=True)
class Pace:
    """Seconds an image, decoding included, on this machine."""

    trained: float  # decoded, forward and back
    forward: float  # decoded, forward

    def estimate(self, work: Work) -> float:
        """Return the seconds that this work will take."""
        return self.trained * work.trained + self.forward * work.forward


def measure_pace(manifest: Manifest, backbone: Backbone, *, device: torch.device, loop: Loop = DEFAULT_LOOP) -> Pace:
    """Time the first few rows of `manifest`, which must be readable, as `loop` runs; the weights do not matter."""
    timed = hash_files(manifest.subset(np.arange(min(N_TIMED, manifest.n_rows))), known={})
    start = time.perf_counter()
    transform = partial(eval_pixels, preprocessing=backbone.preprocessing)
    pixels = load_pixels(timed, transform, workers=loop.workers)  # uint8 [B, crop, crop, 3]
    decode = time.perf_counter() - start
    network = copy.deepcopy(backbone.network)
    network.to(device).to(memory_format=loop.memory_format)
    images = normalise(torch.from_numpy(pixels).to(device), backbone.preprocessing)
    batches = torch.split(images.contiguous(memory_format=loop.memory_format), loop.batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.SEED_LR_BACKBONE, momentum=config.MOMENTUM)
    with full_float32(), memory_errors(device):
        forward = _time(lambda: _forward(network, batches), device)
        with autocast(loop.compute, device):
            trained = _time(lambda: _train(network, batches, optimizer), device)
    return Pace(trained=(decode + trained) / len(pixels), forward=(decode + forward) / len(pixels))


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a second time; the first one also allocates and picks its algorithms."""
    run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _forward(network: torch.nn.Module, batches: Sequence[torch.Tensor]) -> None:
    with torch.inference_mode():
        for images in batches:
            network(images)


def _train(network: torch.nn.Module, batches: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    for images in batches:
        optimizer.zero_grad()
        embeddings = network(images).float()
        functional.mse_loss(embeddings, torch.zeros_like(embeddings)).backward()
        optimizer.step()
