"""What only a GPU can show: the engines of this room on one, and a first extraction and fine-tuning there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import transfercache as tc
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU on this machine")

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth images, as photographs are: their features differ from one to the next."""
    grids = np.random.default_rng(7).integers(0, 256, (32, 7, 7, 3), dtype=np.uint8)
    images = [Image.fromarray(grid).resize((224, 224), Image.Resampling.BICUBIC) for grid in grids]
    return np.stack([np.asarray(image) for image in images])  # uint8 [32, 224, 224, 3]


@pytest.fixture(scope="module")
def expected(resnet18: Backbone, pixels: np.ndarray) -> np.ndarray:
    return EagerEngine(resnet18, CPU).embed(pixels)


def least_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest feature."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_fp32__is_that_of_the_cpu(
    resnet18: Backbone, cuda: torch.device, pixels: np.ndarray, expected: np.ndarray
) -> None:
    features = EagerEngine(resnet18, cuda).embed(pixels)
    assert (features.dtype, features.shape) == (np.float32, expected.shape)
    assert least_cosine(features, expected) >= 0.99999
    assert relative_error(features, expected) < 1e-4  # TF32 would be off by some 1e-3


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision__is_near_that_of_the_cpu(
    compute: str, resnet18: Backbone, cuda: torch.device, pixels: np.ndarray, expected: np.ndarray
) -> None:
    features = EagerEngine(resnet18, cuda, compute=compute).embed(pixels)
    assert features.dtype == np.float32
    assert least_cosine(features, expected) >= 0.999
    assert 1e-5 < relative_error(features, expected) < 5e-2  # it did run in half precision


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11's own, on Python 3.12
def test_compile__is_that_of_eager(
    resnet18: Backbone, cuda: torch.device, pixels: np.ndarray, expected: np.ndarray
) -> None:
    features = EagerEngine(resnet18, cuda, is_compiled=True).embed(pixels)
    assert relative_error(features, expected) < 1e-4


def test_embed__twice__gives_the_same_bits(resnet18: Backbone, cuda: torch.device, pixels: np.ndarray) -> None:
    engine = EagerEngine(resnet18, cuda)
    first = engine.embed(pixels)
    # Other batches in between reuse the memory of the first.
    others = [engine.embed(np.roll(pixels, shift, axis=0)) for shift in (1, 5)]
    np.testing.assert_array_equal(engine.embed(pixels), first)
    for shift, other in zip((1, 5), others, strict=True):
        np.testing.assert_allclose(other, np.roll(first, shift, axis=0), rtol=1e-4, atol=1e-5)


def test_embed__of_read_only_pixels_and_of_one_image(
    resnet18: Backbone, cuda: torch.device, pixels: np.ndarray, expected: np.ndarray
) -> None:
    one = pixels[3:4].copy()
    one.flags.writeable = False
    assert relative_error(EagerEngine(resnet18, cuda).embed(one), expected[3:4]) < 1e-4


def test_embed__changes_nothing_in_the_network(resnet18: Backbone, cuda: torch.device, pixels: np.ndarray) -> None:
    engine = EagerEngine(resnet18, cuda)
    before = {name: tensor.clone() for name, tensor in engine._network.state_dict().items()}
    engine.embed(pixels)
    assert "bn1.running_mean" in before
    for name, tensor in engine._network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(tensor.device.type == "cpu" for tensor in resnet18.network.state_dict().values())


@pytest.fixture
def cramped(cuda: torch.device) -> Iterator[None]:
    """Let torch take 400 MiB beyond what it holds; the rest of the card is left alone."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(cuda) + 400 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(cuda).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_embed__of_a_batch_that_does_not_fit__is_halved_until_it_does(
    resnet18: Backbone,
    cuda: torch.device,
    pixels: np.ndarray,
    expected: np.ndarray,
    cramped: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = EagerEngine(resnet18, cuda)
    engine.embed(pixels[:2])
    assert caplog.messages == []
    # The first convolution alone makes 3 MiB an image.
    features = engine.embed(np.concatenate([pixels] * 8))
    assert relative_error(features, np.concatenate([expected] * 8)) < 1e-4
    (message,) = caplog.messages
    assert message.startswith("cuda: out of memory for 256 images; from now on ")
    assert int(message.split()[-3]) in (64, 32, 16, 8)
    engine.embed(pixels)
    assert len(caplog.messages) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light images, six of a class."""
    folder = tmp_path_factory.mktemp("data")
    for label, level in (("dark", 60), ("light", 190)):
        (folder / label).mkdir()
        for number in range(6):
            noise = np.random.default_rng(number).normal(level, 20, (48, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(folder / label / f"{number}.png")
    return folder


def test_extract_features__on_a_gpu__is_near_that_of_the_cpu(data: Path, tmp_path: Path) -> None:
    on_cpu = tc.extract_features(data, weights="random", device="cpu", engine="eager", cache_dir=tmp_path / "cpu")
    on_gpu = tc.extract_features(data, weights="random", device="cuda", cache_dir=tmp_path / "gpu")
    assert (on_gpu.computed, on_gpu.engine, on_gpu.compute) == (12, "eager", "fp32")
    assert on_gpu.device == torch.cuda.get_device_name()
    assert least_cosine(on_gpu.table().features, on_cpu.table().features) >= 0.99999
    half = tc.extract_features(data, weights="random", device="cuda", compute="bf16", cache_dir=tmp_path / "gpu")
    assert half.cache != on_gpu.cache
    assert least_cosine(half.table().features, on_cpu.table().features) >= 0.999
    # A head of the one serves the other.
    head = tc.train_head(on_cpu, C=1.0, out=tmp_path / "head.safetensors")
    np.testing.assert_array_equal(head.predict(on_gpu.table().features), head.predict(on_cpu.table().features))


def test_finetune__on_a_gpu__leaves_a_model_that_the_cpu_predicts_with(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    records: list[float] = []
    tc.finetune(
        data,
        weights="random",
        device="cuda",
        epochs=1,
        batch_size=4,
        out=out,
        on_epoch=lambda record: records.append(record.train_loss),
    )
    assert len(records) == 1
    assert np.isfinite(records[0])
    predictions = [tc.predict(out, data, device=device, cache_dir=tmp_path) for device in ("cpu", "cuda")]
    cpu, gpu = ([(image.path, dict(image.top)["dark"]) for image in one.images] for one in predictions)
    assert gpu == [(path, pytest.approx(probability, abs=1e-3)) for path, probability in cpu]
