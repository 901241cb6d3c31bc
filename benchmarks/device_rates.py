"""Rates of one device: products of matrices, the network on tensors that lie there, and the engine from host memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import ResNet18_Weights
from turns import in_turns, ratios, spread, timed

from transfercache.backbones.available import COMPILE, EAGER
from transfercache.backbones.devices import synchronize
from transfercache.backbones.engines import EagerEngine, full_float32
from transfercache.backbones.registry import Backbone

#: Billions of operations of one image, a multiplication and an addition being two.
GIGA_OPS = 2 * ResNet18_Weights.IMAGENET1K_V1.meta["_ops"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: On a GPU: side of the products, how many are timed at once, and images that are timed at once.
PRODUCT, PRODUCTS, IMAGES = 8192, 8, 4096
#: On a CPU, where all is tiny.
CPU_PRODUCT = 512


@dataclass(frozen=True)
class Variant:
    """A way to run the network; all but the last four are what an engine does."""

    compute: str
    how: str = EAGER  # or COMPILE
    layout: torch.memory_format = torch.channels_last
    is_tuned: bool = False  # cuDNN times its algorithms for each shape, and takes the fastest
    is_tf32: bool = False  # convolutions of fp32 are TF32, as PyTorch has it by default
    is_cast: bool = False  # the weights are half precision themselves, instead of autocast

    @property
    def name(self) -> str:
        """Return what to call it."""
        extra = {
            "NCHW": self.layout != torch.channels_last,
            "cudnn.benchmark": self.is_tuned,
            "TF32": self.is_tf32,
            "weights cast": self.is_cast,
        }
        return ", ".join([f"{self.compute} {self.how}", *(word for word, holds in extra.items() if holds)])


def variants(device: torch.device, computes: Sequence[str]) -> tuple[list[Variant], list[Variant]]:
    """Return what an engine does here, and what else could be done."""
    ways = (EAGER, COMPILE) if device.type == "cuda" else (EAGER,)  # compiling is refused on a CPU
    ours = [Variant(compute, how) for how in ways for compute in computes]
    if device.type != "cuda":
        return ours, []
    plain = torch.contiguous_format
    others = [
        Variant("fp32", layout=plain),
        Variant("fp32", is_tuned=True),
        Variant("fp32", layout=plain, is_tuned=True),
        Variant("fp32", is_tf32=True),
        Variant("bf16", is_tuned=True),
        Variant("bf16", is_cast=True),
    ]
    return ours, others


def products(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return what gives the rate of a large product in that precision, in TFLOP/s."""
    is_gpu = device.type == "cuda"
    side, repeats = (PRODUCT, PRODUCTS) if is_gpu else (CPU_PRODUCT, 1)
    a = torch.randn(side, side, device=device).to(dtype)

    def run() -> float:
        with full_float32():
            seconds = _device_seconds(lambda: a @ a, device, repeats)
        return 2 * side**3 * repeats / seconds / 1e12

    return run


def network_side(network: nn.Module, images: torch.Tensor, variant: Variant) -> Callable[[], float]:
    """Return what runs the bare network over images that lie on its device, in images a second."""
    dtype = DTYPES[variant.compute]
    weights = copy.deepcopy(network).eval().to(images.device)
    weights = weights.to(memory_format=variant.layout).to(dtype if variant.is_cast else torch.float32)
    batch = images.to(memory_format=variant.layout).to(dtype if variant.is_cast else torch.float32)
    forward = torch.compile(weights, dynamic=False) if variant.how == COMPILE else weights
    autocast = torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32 and not variant.is_cast)
    repeats = max(IMAGES // len(batch), 1) if images.device.type == "cuda" else 1

    def run() -> float:
        with torch.inference_mode(), _precision(variant), autocast:
            seconds = _device_seconds(lambda: forward(batch), images.device, repeats)
        return repeats * len(batch) / seconds

    return run


@contextmanager
def _precision(variant: Variant) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = variant.is_tuned
    try:
        if variant.is_tf32:
            yield
        else:
            with full_float32():
                yield
    finally:
        torch.backends.cudnn.benchmark = before


def _device_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of `repeats` calls, from an idle device to an idle one; one call before them warms it."""
    work()
    synchronize(device)

    def run() -> None:
        for _ in range(repeats):
            work()
        synchronize(device)

    return timed(run)


def network_rates(
    backbone: Backbone, device: torch.device, *, computes: Sequence[str], batches: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Return images a second of each variant at each batch size, and their share of the device's own product rate.

    What no engine does is run at the middle batch size alone. All sides take turns.
    """
    # Each variant and shape is compiled anew; past Dynamo's limit of 8 it would run them eagerly instead.
    torch._dynamo.config.recompile_limit = 64
    ours, others = variants(device, computes)
    runs = {variant.name: (variant, batches) for variant in ours}
    runs |= {variant.name: (variant, batches[len(batches) // 2 : len(batches) // 2 + 1]) for variant in others}
    crop = backbone.preprocessing.crop
    resident = {batch: torch.randn(batch, 3, crop, crop, device=device) for batch in batches}
    sides = {("product", compute): products(device, DTYPES[compute]) for compute in computes}
    for name, (variant, sizes) in runs.items():
        sides |= {(name, size): network_side(backbone.network, resident[size], variant) for size in sizes}
    rates = in_turns(sides, repeats=repeats)

    def figures(variant: Variant, size: int) -> dict[str, Any]:
        rate = rates[variant.name, size]
        possible = [1e3 * tflops / GIGA_OPS for tflops in rates["product", variant.compute]]  # images a second
        return {"images_per_s": spread(rate), "share_of_product": ratios(rate, possible)}

    return {
        "product_tflops": {compute: spread(rates["product", compute]) for compute in computes},
        "networks": {
            name: {f"batch {size}": figures(variant, size) for size in sizes} for name, (variant, sizes) in runs.items()
        },
    }


def engine_rates(
    backbone: Backbone, device: torch.device, pixels: np.ndarray, *, computes: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return images a second of `embed`, from uint8 in host memory to features there, and what the first batch took."""
    engines, first = {}, {}
    for variant in variants(device, computes)[0]:
        engine = EagerEngine(backbone, device, compute=variant.compute, is_compiled=variant.how == COMPILE)
        engines[variant.name] = engine
        first[variant.name] = timed(lambda engine=engine: engine.embed(pixels))
    n_batches = max(IMAGES // len(pixels), 1) if device.type == "cuda" else 1

    def side(engine: EagerEngine) -> Callable[[], float]:
        return lambda: n_batches * len(pixels) / timed(lambda: [engine.embed(pixels) for _ in range(n_batches)])

    rates = in_turns({name: side(engine) for name, engine in engines.items()}, repeats=repeats)
    return {
        "batch": len(pixels),
        **{
            name: {"images_per_s": spread(rate), "first_batch_s": float(f"{first[name]:.3g}")}
            for name, rate in rates.items()
        },
    }
