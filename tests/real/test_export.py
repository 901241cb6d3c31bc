"""The exported ONNX file as a stranger uses it: ONNX Runtime behind torchvision's own transforms, by its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from transfercache.backbones.engines import EagerEngine
from transfercache.commands.export import export
from transfercache.commands.extract import Extraction
from transfercache.commands.finetune import finetune
from transfercache.commands.predict import predict
from transfercache.commands.train import train_head
from transfercache.images.decode import decode_image
from transfercache.images.transforms import eval_pixels
from transfercache.metrics import softmax
from transfercache.models.head_file import load_model
from transfercache.models.network import load_backbone_of

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def head(extraction: Extraction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "head.safetensors"
    train_head(extraction, C=0.1, calibrate=True, out=path)
    return path


@pytest.fixture(scope="module")
def finetuned(real_photos: Path, real_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "finetuned.safetensors"
    finetune(real_photos, weights=str(real_weights), epochs=1, compute="fp32", out=path)
    return path


@pytest.mark.parametrize("kind", ["head", "finetuned"])
def test_onnx__on_the_validation_images__predicts_what_tlc_does(
    request: pytest.FixtureRequest, kind: str, real_photos: Path, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(kind)
    export(path, format="onnx", out=tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    recipe, names = json.loads(metadata["preprocessing"]), json.loads(metadata["class_names"])
    transform = Compose(
        [
            Resize(recipe["resize"], InterpolationMode(recipe["interpolation"]), antialias=recipe["antialias"]),
            CenterCrop(recipe["crop"]),
            ToTensor(),
            Normalize(recipe["mean"], recipe["std"]),
        ]
    )
    photos = sorted((real_photos / "val").rglob("*.jpg"))
    opened = [Image.open(photo).convert("RGB") for photo in photos]
    (logits,) = session.run(["logits"], {"images": torch.stack([transform(image) for image in opened]).numpy()})

    model = load_model(path)
    engine = EagerEngine(load_backbone_of(model, path, weights=None).load(), torch.device("cpu"))
    preprocessing = model.head.spec.preprocessing
    pixels = [eval_pixels(decode_image(photo.read_bytes(), photo.name), preprocessing) for photo in photos]
    own = np.concatenate([model.head.logits(engine.embed(part)) for part in np.array_split(np.stack(pixels), 10)])
    np.testing.assert_allclose(logits * model.head.temperature, own, atol=1e-4)

    images = predict(path, [real_photos / "val"], engine="eager", cache_dir=tmp_path / "none").images
    assert len(images) == 153
    assert [names[i] for i in logits.argmax(axis=1)] == [image.label for image in images]
    np.testing.assert_allclose(softmax(logits).max(axis=1), [image.probability for image in images], atol=1e-5)
