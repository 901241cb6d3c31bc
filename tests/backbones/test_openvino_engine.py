from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from transfercache.backbones.available import bf16_units, kept_networks
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone
from transfercache.backbones.weights import weights_digest
from transfercache.errors import ResourceError, UsageError

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

from transfercache.backbones import openvino_conversion
from transfercache.backbones.openvino_engine import OpenvinoEngine

CPU = torch.device("cpu")
CROP = 64
FILES = ("network.xml", "network.bin", "contents.json")


class Blurred(nn.Module):
    """Four features: the mean of each colour, after a convolution, and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 3, 5)
        nn.init.constant_(self.blur.weight, 0.02)
        nn.init.zeros_(self.blur.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = self.blur(images).mean((2, 3))
        return torch.cat([means, means.mean(1, keepdim=True)], 1)


@pytest.fixture
def small(resnet18: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A network that is converted in no time, of a crop of 64, and an empty folder for what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return with_network(resnet18, Blurred())


def with_network(backbone: Backbone, network: nn.Module) -> Backbone:
    preprocessing = replace(backbone.preprocessing, crop=CROP)
    return replace(backbone, name="made/small", network=network.eval(), dim=4, preprocessing=preprocessing)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest feature."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def precisions_that_ran(engine: OpenvinoEngine) -> set[str]:
    """The precisions of the layers that multiply, as the compiled network itself reports them."""
    operations = engine._compiled.get_runtime_model().get_ops()
    infos = [operation.get_rt_info() for operation in operations]
    multiplying = [info for info in infos if info["layerType"].astype(str) in ("Convolution", "FullyConnected")]
    assert len(multiplying) == 20  # a ResNet-18 has so many convolutions
    return {info["runtimePrecision"].astype(str) for info in multiplying}


def test_fp32__is_what_ran_and_equals_eager(resnet18: Backbone) -> None:
    engine, pixels = OpenvinoEngine(resnet18), canary_pixels(224)
    features = engine.embed(pixels)
    assert features.dtype == np.float32
    assert relative_error(features, EagerEngine(resnet18, CPU).embed(pixels)) < 1e-5
    # On a processor with bfloat16 units OpenVINO left to itself would have taken those.
    assert precisions_that_ran(engine) == {"f32"}
    assert str(engine._compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


@pytest.mark.skipif(not bf16_units(), reason="this processor has no bfloat16 units")
def test_bf16__is_what_ran_and_is_near_eager(resnet18: Backbone) -> None:
    engine, pixels = OpenvinoEngine(resnet18, compute="bf16"), canary_pixels(224)
    error = relative_error(engine.embed(pixels), EagerEngine(resnet18, CPU).embed(pixels))
    assert precisions_that_ran(engine) == {"bf16"}
    assert 1e-4 < error < 5e-2


def test_embed__a_row_does_not_depend_on_its_company(resnet18: Backbone) -> None:
    engine = OpenvinoEngine(resnet18)
    pixels = np.random.default_rng(5).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    padded = pixels.copy()
    padded[[0, 1, 2, 4, 6, 7]] = 0
    together = engine.embed(pixels)
    np.testing.assert_array_equal(engine.embed(padded)[[3, 5]], together[[3, 5]])
    assert relative_error(engine.embed(pixels[3:4]), together[3:4]) < 1e-5
    assert np.ptp(together, axis=0).max() > 1e-3  # rows do differ


def test_embed__takes_read_only_pixels_and_leaves_all_as_it_was(small: Backbone) -> None:
    state = {name: tensor.clone() for name, tensor in small.network.state_dict().items()}
    pixels = canary_pixels(CROP)
    pixels.flags.writeable = False
    features = OpenvinoEngine(small).embed(pixels)
    np.testing.assert_allclose(features, EagerEngine(small, CPU).embed(pixels), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pixels, canary_pixels(CROP))
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.network.state_dict().items())


def test_embed__the_result_is_the_callers_own(small: Backbone) -> None:
    engine = OpenvinoEngine(small)
    first = engine.embed(canary_pixels(CROP))
    kept = first.copy()
    engine.embed(255 - canary_pixels(CROP))
    np.testing.assert_array_equal(first, kept)


def test_kept_network__is_opened_and_not_converted_again(small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    features = OpenvinoEngine(small).embed(canary_pixels(CROP))
    (folder,) = kept_networks().iterdir()
    assert folder.name.startswith("made-small-")
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "network.bin").stat().st_size >= 4 * (3 * 3 * 25 + 3)  # float32, not halved

    def refuse(_: Backbone) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(openvino_conversion, "convert", refuse)
    np.testing.assert_array_equal(OpenvinoEngine(small).embed(canary_pixels(CROP)), features)


@pytest.mark.parametrize("damage", ["torn network.bin", "torn network.xml", "no contents.json", "other versions"])
def test_kept_network__that_cannot_be_trusted__is_made_again(
    small: Backbone, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = OpenvinoEngine(small).embed(canary_pixels(CROP))
    (folder,) = kept_networks().iterdir()
    whole = {name: (folder / name).read_bytes() for name in FILES}
    word, _, name = damage.partition(" ")
    if word == "torn":
        (folder / name).write_bytes(whole[name][:-1])
    elif word == "no":
        (folder / name).unlink()
    else:
        contents = json.loads(whole["contents.json"])
        contents["identity"]["versions"]["torch"] = "1.0"
        (folder / "contents.json").write_text(json.dumps(contents))
    with caplog.at_level(logging.WARNING):
        features = OpenvinoEngine(small).embed(canary_pixels(CROP))
    assert caplog.messages == [f"{folder}: damaged, or made by other versions; the network is converted again"]
    np.testing.assert_array_equal(features, expected)
    identity = json.loads(whole["contents.json"])["identity"]
    assert json.loads((folder / "contents.json").read_bytes())["identity"] == identity
    assert (folder / "network.bin").read_bytes() == whole["network.bin"]


def test_kept_network__of_the_same_name_with_other_weights__is_another(small: Backbone) -> None:
    OpenvinoEngine(small)
    other = Blurred()
    nn.init.constant_(other.blur.weight, 0.04)
    changed = replace(small, network=other.eval(), weights_digest=weights_digest(other.state_dict()))
    found = OpenvinoEngine(changed).embed(canary_pixels(CROP))
    np.testing.assert_allclose(found, EagerEngine(changed, CPU).embed(canary_pixels(CROP)), rtol=1e-5, atol=1e-6)
    assert len(list(kept_networks().iterdir())) == 2


def test_signal__reaches_its_handler_after_engines_have_come_and_gone(tmp_path: Path) -> None:
    # A process of its own, as the fault would end it. Seen on processors with AMX alone: others have no such stacks.
    program = """
import gc, os, signal
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.openvino_engine import OpenvinoEngine
from transfercache.backbones.registry import load_backbone

backbone = load_backbone("mobilenet_v3_small", weights="random")
engines = [OpenvinoEngine(backbone), OpenvinoEngine(backbone)]
for engine in engines:
    engine.embed(canary_pixels(backbone.preprocessing.crop))
del engine
while engines:
    engines.pop(0)
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n")


def test_kept_network__where_nothing_can_be_kept__says_so_and_goes_on(
    small: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with caplog.at_level(logging.WARNING):
        features = OpenvinoEngine(small).embed(canary_pixels(CROP))
    (message,) = caplog.messages
    assert "the converted network is not kept (" in message
    assert "cannot be written" in message
    np.testing.assert_allclose(features, EagerEngine(small, CPU).embed(canary_pixels(CROP)), rtol=1e-5, atol=1e-6)


def test_kept_network__on_a_full_disk__leaves_no_part(small: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # of bytes a file, too few for any of the three
        with pytest.raises(ResourceError, match=r"free some space, or pass --engine eager"):
            OpenvinoEngine(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the converted network is not kept (" in caplog.messages[0]
    assert list(kept_networks().iterdir()) == []


class Singular(nn.Module):
    """What the front end has no operation for."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(images[:, 0])


class Sharing(nn.Module):
    """Features that depend on the whole batch by way of a Python number, which tracing makes a constant."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * float(images.square().sum())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Singular(), "made/small: OpenVINO cannot convert it (.*); pass --engine eager"),
        (Sharing(), r"its embeddings are off by 0\.\d+ of the largest feature; pass --engine eager"),
    ],
)
def test_conversion__that_does_not_go_well__is_refused_and_not_kept(
    small: Backbone, network: nn.Module, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        OpenvinoEngine(with_network(small, network))
    assert not kept_networks().exists() or list(kept_networks().iterdir()) == []


# Each event that a connection begins with is written down at once: statistics are sent by a thread, until the very end.
WATCHED = """
import sys
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.")) and event != "socket.__new__":
        print("SEEN", event, arguments, file=sys.stderr, flush=True)
sys.addaudithook(watch)
import socket
print("probe", file=sys.stderr, flush=True)
try:
    socket.getaddrinfo("localhost", 9)
except OSError:
    pass
print("start", file=sys.stderr, flush=True)
from transfercache.backbones.registry import load_backbone
from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.openvino_engine import OpenvinoEngine
OpenvinoEngine(load_backbone("mobilenet_v3_small", weights="random")).embed(canary_pixels(224))
print("done")
"""


def test_conversion__sends_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):  # in which OpenVINO would send nothing anyway
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    before, _, after = done.stderr.partition("start\n")
    assert "SEEN socket.getaddrinfo" in before  # the hook sees what there is to see
    assert "SEEN" not in after
    # Nor is an identity made for this user, as a plain import of OpenVINO does.
    assert [path.name for path in tmp_path.iterdir()] == ["xdg"]
