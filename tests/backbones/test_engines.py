from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from transfercache.backbones.available import bf16_units
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import EagerEngine, full_float32, normalise
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.errors import ResourceError

CPU = torch.device("cpu")


def varied_pixels(n_images: int, crop: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (n_images, crop, crop, 3), dtype=np.uint8)


def test_embed__batch_of_one_equals_batch_of_eight(resnet18: Backbone) -> None:
    engine = EagerEngine(resnet18, CPU)
    pixels = varied_pixels(8, 224)
    together = engine.embed(pixels)
    alone = np.concatenate([engine.embed(pixels[row : row + 1]) for row in range(8)])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    assert np.ptp(together, axis=0).max() > 1e-3  # rows do differ


def test_embed__changes_nothing_in_the_network(resnet18: Backbone) -> None:
    engine = EagerEngine(resnet18, CPU)
    networks = (engine._network, resnet18.network)
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in networks]
    for seed in range(5):
        engine.embed(varied_pixels(2, 64) // (seed + 1))
    for network, state in zip(networks, before, strict=True):
        assert not any(module.training for module in network.modules())
        assert "bn1.num_batches_tracked" in state
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_embed__turns_dropout_off_in_a_backbone_left_in_train_mode() -> None:
    backbone = load_backbone("mobilenet_v3_small", weights="random")
    expected = EagerEngine(backbone, CPU).embed(canary_pixels(224))
    backbone.network.train()
    np.testing.assert_array_equal(EagerEngine(backbone, CPU).embed(canary_pixels(224)), expected)


def test_embed__takes_read_only_pixels(resnet18: Backbone) -> None:
    pixels = canary_pixels(64)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    engine = EagerEngine(resnet18, CPU)
    np.testing.assert_array_equal(engine.embed(frozen), engine.embed(pixels))


def test_embed__leaves_the_pixels_as_they_were(resnet18: Backbone) -> None:
    pixels = canary_pixels(64)
    EagerEngine(resnet18, CPU).embed(pixels)
    np.testing.assert_array_equal(pixels, canary_pixels(64))


def test_normalise__is_that_of_torchvision_in_channels_last(resnet18: Backbone) -> None:
    pixels = varied_pixels(3, 32)
    found = normalise(torch.from_numpy(pixels), resnet18.preprocessing)
    steps = Compose([ToTensor(), Normalize(resnet18.preprocessing.mean, resnet18.preprocessing.std)])
    expected = torch.stack([steps(Image.fromarray(image)) for image in pixels])
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def shortcuts() -> list[str]:
    backends = torch.backends
    return [module.fp32_precision for module in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)]


def test_full_float32__restores_what_was_set() -> None:
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (convolutions.allow_tf32, products.allow_tf32)
    try:
        for allowed in (True, False):
            convolutions.allow_tf32 = products.allow_tf32 = allowed
            outside = shortcuts()
            with full_float32():
                assert shortcuts() == ["ieee", "ieee", "ieee"]
            assert shortcuts() == outside
            assert (convolutions.allow_tf32, products.allow_tf32) == (allowed, allowed)
        with pytest.raises(ZeroDivisionError), full_float32():
            _ = 1 / 0
        assert shortcuts() == outside
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def test_canary_pixels__are_the_same_bytes_for_ever() -> None:
    assert hashlib.sha256(canary_pixels(224).tobytes()).hexdigest()[:16] == "e48a2719290b138c"


def test_canary_pixels__are_smooth_and_differ() -> None:
    pixels = canary_pixels(224).astype(int)
    assert pixels.shape == (4, 224, 224, 3)
    assert np.abs(np.diff(pixels, axis=1)).max() <= 8
    assert np.abs(np.diff(pixels, axis=2)).max() <= 8
    assert pixels.min() < 30
    assert pixels.max() > 225
    assert np.abs(pixels[0] - pixels[1]).mean() > 30


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest feature."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.skipif(not bf16_units(), reason="this processor has no bfloat16 units")
def test_bf16__is_near_float32(resnet18: Backbone) -> None:
    pixels = canary_pixels(224)
    features = EagerEngine(resnet18, CPU, compute="bf16").embed(pixels)
    assert features.dtype == np.float32
    assert 1e-4 < relative_error(features, EagerEngine(resnet18, CPU).embed(pixels)) < 5e-2


class Cramped(torch.nn.Module):
    """The mean colour of each image, in a memory that holds a few of them."""

    def __init__(self, holds: int) -> None:
        super().__init__()
        self.holds, self.sizes = holds, []

    def __deepcopy__(self, memo: object) -> Cramped:
        return self  # so that the test sees what its copy does

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return images.mean((2, 3))


def test_embed__of_a_batch_that_does_not_fit__halves_it_and_says_so_once(
    resnet18: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    network = Cramped(holds=3)
    engine = EagerEngine(replace(resnet18, network=network), CPU)
    pixels = varied_pixels(16, 8)
    features = [engine.embed(pixels), engine.embed(pixels[::-1].copy())]
    expected = EagerEngine(replace(resnet18, network=Cramped(holds=16)), CPU).embed(pixels)
    np.testing.assert_allclose(features[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(features[1], features[0][::-1])
    # 16 and 8 images, then 4, do not fit; the next batch starts with what fitted.
    assert network.sizes == [16, 8, 4, *[2] * 8, *[2] * 8]
    assert caplog.messages == ["cpu: out of memory for 16 images; from now on 2 at once"]
    engine.embed(pixels[:1])
    assert caplog.messages[1:] == []


def test_embed__of_an_image_that_does_not_fit__is_refused(resnet18: Backbone) -> None:
    engine = EagerEngine(replace(resnet18, network=Cramped(holds=0)), CPU)
    with pytest.raises(ResourceError, match=r"^cpu: out of memory for a single image; choose a smaller --backbone$"):
        engine.embed(varied_pixels(3, 8))


def test_embed__of_another_error__is_not_tried_again(resnet18: Backbone) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        EagerEngine(replace(resnet18, network=network), CPU).embed(varied_pixels(2, 8))
