from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torchvision
from PIL import Image

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import EagerEngine, normalise
from transfercache.backbones.registry import load_backbone
from transfercache.commands.export import export
from transfercache.commands.extract import extract_features
from transfercache.commands.finetune import finetune
from transfercache.commands.inputs import EmbedOptions
from transfercache.commands.predict import predict
from transfercache.commands.train import train_head
from transfercache.errors import ModelError, ResourceError, UsageError
from transfercache.files import sha256_file
from transfercache.heads.linear_head import LinearHead
from transfercache.images.transforms import eval_pixels
from transfercache.metrics import softmax
from transfercache.models import exported
from transfercache.models.head_file import Model, load_model, save_model
from transfercache.spec import ExtractSpec

SUFFIXES = {"torchvision": ".pth", "safetensors": ".safetensors", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def head(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on a small network, with a temperature."""
    folder = tmp_path_factory.mktemp("models")
    cache = extract_features(pets, backbone="mobilenet_v3_small", weights="random", cache_dir=folder / "cache")
    train_head(cache, C=1.0, out=folder / "head.safetensors")
    model = load_model(folder / "head.safetensors")
    save_model(replace(model, head=replace(model.head, temperature=2.5)), folder / "head.safetensors")
    return folder / "head.safetensors"


@pytest.fixture(scope="module")
def finetuned(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned ResNet: a random network of the smaller kind gives one embedding to all images."""
    out = tmp_path_factory.mktemp("models") / "finetuned.safetensors"
    return finetune(pets, weights="random", epochs=1, batch_size=12, compute="fp32", out=out).model


NETWORKS = {"head": "mobilenet_v3_small", "finetuned": "resnet18"}


def _normalised(path: Path, photo: Path) -> torch.Tensor:
    """What a user of the exported file makes of one photo, by the preprocessing that it names."""
    preprocessing = load_model(path).head.spec.preprocessing
    with Image.open(photo) as image:
        pixels = eval_pixels(image.convert("RGB"), preprocessing)
    return normalise(torch.from_numpy(pixels[None]), preprocessing).contiguous()


def _expected(path: Path, photo: Path) -> np.ndarray:
    """The probabilities of `tlc predict` in the order of the classes."""
    (image,) = predict(path, photo, engine="eager").images
    return np.array([dict(image.top)[name] for name in load_model(path).head.class_names])


@pytest.mark.parametrize("kind", ["head", "finetuned"])
def test_torchvision__loads_strictly_and_gives_the_probabilities_of_predict(
    request: pytest.FixtureRequest, kind: str, pets: Path, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(kind)
    result = export(path, out=tmp_path / "net.pth", check=pets)
    network = getattr(torchvision.models, NETWORKS[kind])(num_classes=2)
    network.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True), strict=True)
    photo = pets / "dog" / "3.png"
    with torch.inference_mode():
        logits = network.eval()(_normalised(path, photo)).numpy()
    np.testing.assert_allclose(softmax(logits)[0], _expected(path, photo), atol=1e-6)
    assert result.checked == 4 + 16
    assert result.other_labels == 0
    assert 0 <= result.difference <= 1e-4
    assert result.metadata["network"] == f"torchvision.models.{NETWORKS[kind]}(num_classes=2)"
    sidecar = json.loads((tmp_path / "net.pth.json").read_text())
    assert sidecar == result.metadata
    assert json.loads(sidecar["class_names"]) == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["head", "finetuned"])
def test_onnx__is_run_by_onnx_runtime_in_batches_of_any_size(
    request: pytest.FixtureRequest, kind: str, pets: Path, tmp_path: Path
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path: Path = request.getfixturevalue(kind)
    result = export(path, format="onnx", out=tmp_path / "net.onnx", check=pets)
    assert result.checked == 20
    assert [item.name for item in tmp_path.iterdir()] == ["net.onnx"]
    graph = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(graph)
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", exported.OPSET)]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    photos = sorted((pets / "dog").iterdir())[:3]
    images = torch.cat([_normalised(path, photo) for photo in photos]).numpy()
    (logits,) = session.run(["logits"], {"images": images})
    expected = np.stack([_expected(path, photo) for photo in photos])
    np.testing.assert_allclose(softmax(logits), expected, atol=1e-6)
    (alone,) = session.run(None, {"images": images[:1]})
    np.testing.assert_allclose(alone, logits[:1], atol=1e-5)
    head = load_model(path).head
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == result.metadata
    assert json.loads(metadata["class_names"]) == ["cat", "dog"]
    assert ExtractSpec.from_json(json.loads(metadata["spec"])) == head.spec
    assert json.loads(metadata["preprocessing"])["mean"] == list(head.spec.preprocessing.mean)
    assert metadata["temperature"] == repr(head.temperature)
    assert metadata["model_sha256"] == sha256_file(path)


def test_safetensors__has_the_same_tensors_and_the_metadata(head: Path, tmp_path: Path) -> None:
    export(head, out=tmp_path / "net.pth")
    result = export(head, format="safetensors", out=tmp_path / "net.safetensors")
    expected = torch.load(tmp_path / "net.pth", weights_only=True)
    with safetensors.safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert file.metadata() == result.metadata
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Who may read them is the umask's to say.
    assert result.out.stat().st_mode == (tmp_path / "net.pth").stat().st_mode
    head_of = load_model(head).head
    np.testing.assert_array_equal(found["classifier.3.weight"].numpy(), head_of.weight / np.float32(2.5))
    np.testing.assert_array_equal(found["classifier.3.bias"].numpy(), head_of.bias / np.float32(2.5))


def _random_model(backbone: str, path: Path) -> Path:
    """A MODEL of three classes on a random network, without a training run: logits of the size of one."""
    loaded = load_backbone(backbone, weights="random")
    canaries = EagerEngine(loaded, torch.device("cpu")).embed(canary_pixels(loaded.preprocessing.crop))
    scale = 1 / np.linalg.norm(canaries, axis=1).max()
    head = LinearHead(
        weight=np.random.default_rng(0).normal(0, scale, (3, loaded.dim)).astype(np.float32),
        bias=np.array([0.5, -0.5, 0.0], np.float32),
        class_names=("a", "b", "c"),
        spec=EmbedOptions().spec(loaded),
        solver="logistic",
        n_train=3,
    )
    save_model(Model(head, head.logits(canaries), loaded.weights_source), path)
    return path


@pytest.mark.parametrize(
    ("backbone", "formats", "call"),
    [
        ("resnet18", ("torchvision", "safetensors"), "torchvision.models.resnet18(num_classes=3)"),
        (
            "googlenet",
            ("torchvision",),
            "torchvision.models.googlenet(num_classes=3, aux_logits=False, transform_input=True, init_weights=False)",
        ),
        ("efficientnet_lite0", ("safetensors", "onnx"), "timm.create_model('tf_efficientnet_lite0', num_classes=3)"),
    ],
)
def test_families__agree_in_the_formats_they_have(
    backbone: str, formats: tuple[str, ...], call: str, tmp_path: Path
) -> None:
    if backbone == "efficientnet_lite0":
        pytest.importorskip("timm")
        pytest.importorskip("onnxscript")
    path = _random_model(backbone, tmp_path / "head.safetensors")
    for name in formats:
        result = export(path, format=name)
        assert result.out == tmp_path / f"head-exported{SUFFIXES[name]}"
        assert result.out.is_file()
        assert result.checked == 4
        assert result.difference <= 1e-4
        assert result.metadata["network"] == call


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("efficientnet_lite0", r"efficientnet_lite0 is timm's, and torchvision has no such .*; pass --format safetens"),
        ("maxvit_t", r"the tensors do not load into torchvision\.models\.maxvit_t\(num_classes=3\) \(.*--format onnx"),
    ],
)
def test_torchvision__of_a_network_that_torchvision_has_otherwise(backbone: str, message: str, tmp_path: Path) -> None:
    if backbone == "efficientnet_lite0":
        pytest.importorskip("timm")
    path = _random_model(backbone, tmp_path / "head.safetensors")
    with pytest.raises(UsageError, match=message):
        export(path)
    assert [item.name for item in tmp_path.iterdir()] == ["head.safetensors"]


@pytest.mark.parametrize(
    ("name", "older"), [("torchvision", None), ("torchvision", b"older"), ("safetensors", b"older"), ("onnx", None)]
)
def test_file_that_differs__is_not_left_behind_and_an_older_one_stays(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, older: bytes | None
) -> None:
    if name == "onnx":
        pytest.importorskip("onnxscript")
    chosen = exported.FORMATS[name]

    def write(classifier: exported.Classifier, path: Path) -> None:
        with torch.no_grad():
            classifier.network.classifier[3].bias += 2e-4
        chosen.write(classifier, path)

    monkeypatch.setitem(exported.FORMATS, name, replace(chosen, write=write))
    out = tmp_path / "net"
    if older is not None:
        out.write_bytes(older)
    with pytest.raises(ModelError, match=rf"as {name}, its logits differ from tlc's by 0.0002 on made image 0"):
        export(head, format=name, out=out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if older is None else [older])


def test_check__names_the_image_on_which_it_differs(
    head: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = exported.FORMATS["torchvision"]

    def read(path: Path, backbone: str, n_classes: int) -> exported.Run:
        run = chosen.read(path, backbone, n_classes)
        # Only bright images come out otherwise: the canaries' grid is grey in the mean.
        return lambda images: run(images) + np.float32(images.mean() > 1)

    monkeypatch.setitem(exported.FORMATS, "torchvision", replace(chosen, read=read))
    white = tmp_path / "white.png"
    Image.new("RGB", (9, 9), (255, 255, 255)).save(white)
    with pytest.raises(ModelError, match=r"differ from tlc's by 1 on .*white\.png"):
        export(head, out=tmp_path / "net.pth", check=white)


def test_check__lists_what_is_unreadable(
    head: Path, draw_photos: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = draw_photos(tmp_path / "data", ["a.png", "b.png"])
    (data / "c.png").write_text("text")
    result = export(head, out=tmp_path / "net.pth", check=data)
    assert [(item.path, item.reason) for item in result.bad] == [("c.png", "not an image (it starts like text)")]
    assert result.checked == 6
    assert "1 of 3 images are unreadable; the others were compared" in caplog.messages


def test_bf16__is_exported_in_float32_and_says_so(pets: Path, head: Path, tmp_path: Path) -> None:
    model = load_model(head)
    half = replace(model, head=replace(model.head, spec=replace(model.head.spec, compute="bf16")))
    save_model(half, tmp_path / "half.safetensors")
    result = export(tmp_path / "half.safetensors", check=pets)
    assert "computes in float32; the model was trained, and predict computes, in bf16" in result.notes
    assert {tensor.dtype for tensor in torch.load(result.out, weights_only=True).values()} <= {
        torch.float32,
        torch.int64,
    }


def test_out__that_is_the_model(head: Path) -> None:
    before = head.read_bytes()
    with pytest.raises(UsageError, match="is the MODEL itself; name another file"):
        export(head, format="safetensors", out=head)
    assert head.read_bytes() == before


def test_extra_that_is_missing__is_named_with_its_command(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name == "onnxruntime" else sys.__spec__)
    with pytest.raises(
        ResourceError,
        match=r"--format onnx: onnxruntime is not installed; install it with: pip install 'transfercache\[onnx\]'",
    ):
        export(head, format="onnx")


def test_weights__that_have_moved(pets: Path, tmp_path: Path) -> None:
    backbone = load_backbone("mobilenet_v3_small", weights="random")
    torch.save(backbone.network.state_dict(), tmp_path / "w.pth")
    cache = extract_features(
        pets, backbone=backbone.name, weights=str(tmp_path / "w.pth"), cache_dir=tmp_path / "cache"
    )
    train_head(cache, C=1.0, out=tmp_path / "head.safetensors")
    shutil.move(tmp_path / "w.pth", tmp_path / "moved.pth")
    moved = str(tmp_path / "moved.pth")
    result = export(tmp_path / "head.safetensors", weights=moved)
    kept = ("--format", "torchvision", "--out", str(result.out), "--weights", moved)
    assert result.next_command == ("tlc", "export", str(result.model), *kept, "--check", "images/")
    checked = export(tmp_path / "head.safetensors", weights=moved, check=pets)
    assert checked.next_command == ("tlc", "predict", str(result.model), str(pets), "--weights", moved)
    network = torchvision.models.mobilenet_v3_small(num_classes=2)
    network.load_state_dict(torch.load(result.out, weights_only=True), strict=True)
    photo = pets / "cat" / "0.png"
    images = _normalised(tmp_path / "head.safetensors", photo)
    with torch.inference_mode():
        logits = network.eval()(images).numpy()
    engine = EagerEngine(backbone, torch.device("cpu"))
    preprocessing = backbone.preprocessing
    with Image.open(photo) as image:
        pixels = eval_pixels(image.convert("RGB"), preprocessing)[None]
    own = load_model(tmp_path / "head.safetensors").head.logits(engine.embed(pixels))
    np.testing.assert_allclose(logits, own, atol=1e-4)
