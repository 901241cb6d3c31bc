from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import mobilenet_v3_small

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.choice import Choice, Engine
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone
from transfercache.backbones.weights import seeded
from transfercache.errors import ModelError, WeightsError
from transfercache.models.head_file import Model
from transfercache.models.network import checked_engine, frozen_tensors, load_backbone_of

PATH = Path("model.safetensors")
CPU = torch.device("cpu")
EAGER = Choice("eager", "cpu", "fp32")


def _load_engine(model: Model, path: Path, *, weights: str | None, choice: Choice) -> Engine:
    """As a MODEL that predicts does."""
    return checked_engine(model, path, load_backbone_of(model, path, weights=weights), choice=choice)


def test_engine__of_a_head__is_its_backbone(model: Model, backbone: Backbone) -> None:
    pixels = canary_pixels(224)[:2]
    expected = EagerEngine(backbone, CPU).embed(pixels)
    np.testing.assert_array_equal(_load_engine(model, PATH, weights=None, choice=EAGER).embed(pixels), expected)


def test_engine__of_weights_that_have_moved__takes_the_new_place(
    model: Model, weights_file: Path, tmp_path: Path
) -> None:
    source = {**model.weights_source, "where": str(tmp_path / "gone.pth")}
    moved = replace(model, weights_source=source)
    with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
        _load_engine(moved, PATH, weights=None, choice=EAGER)
    new = tmp_path / "new.pth"
    shutil.copy(weights_file, new)
    _load_engine(moved, PATH, weights=str(new), choice=EAGER)


def test_engine__of_other_weights__is_refused_by_digest(model: Model) -> None:
    with pytest.raises(WeightsError, match=f"not the expected {model.head.spec.weights_digest}"):
        _load_engine(replace(model, weights_source={"kind": "random"}), PATH, weights=None, choice=EAGER)
    with pytest.raises(WeightsError, match="these weights of mobilenet_v3_small have the digest"):
        _load_engine(model, PATH, weights="random", choice=EAGER)


def _bundled(model: Model, backbone: Backbone) -> Model:
    tensors = frozen_tensors(model.head.spec, model.weights_source, weights=None)
    assert tensors.keys() == backbone.network.state_dict().keys()
    return replace(model, bundled_tensors=tensors, weights_source={"kind": "file", "where": "gone.pth"})


def test_engine__of_a_bundled_model__needs_no_other_weights(model: Model, backbone: Backbone) -> None:
    pixels = canary_pixels(224)[:2]
    engine = _load_engine(_bundled(model, backbone), PATH, weights=None, choice=EAGER)
    np.testing.assert_array_equal(engine.embed(pixels), EagerEngine(backbone, CPU).embed(pixels))


def test_engine__of_a_bundled_model__takes_weights_that_are_given(
    model: Model, backbone: Backbone, weights_file: Path
) -> None:
    bundled = _bundled(model, backbone)
    _load_engine(bundled, PATH, weights=str(weights_file), choice=EAGER)
    with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
        _load_engine(bundled, PATH, weights="gone.pth", choice=EAGER)


def test_engine__of_a_bundled_backbone_with_one_bit_flipped__is_refused(model: Model, backbone: Backbone) -> None:
    bundled = _bundled(model, backbone)
    tensors = {name: tensor.copy() for name, tensor in bundled.bundled_tensors.items()}
    # The last bit of one weight, which the canary logits would not show.
    next(iter(tensors.values())).view(np.uint32).flat[0] ^= 1
    with pytest.raises(ModelError, match="the backbone bundled in it fails its digest; train it again"):
        _load_engine(replace(bundled, bundled_tensors=tensors), PATH, weights=None, choice=EAGER)


def test_frozen_tensors__of_other_weights__are_refused_by_digest(model: Model) -> None:
    with pytest.raises(WeightsError, match=f"not the expected {model.head.spec.weights_digest}"):
        frozen_tensors(model.head.spec, model.weights_source, weights="random")


def test_engine__with_other_canary_logits__is_refused(model: Model) -> None:
    other = replace(model, canary_logits=model.canary_logits + np.float32(1))
    with pytest.raises(ModelError, match=r"model\.safetensors: on its own test images"):
        _load_engine(other, PATH, weights=None, choice=EAGER)


def test_engine__of_a_fine_tuned_model__has_its_own_weights(finetuned: Model) -> None:
    # Where the original weights are no longer matters.
    alone = replace(finetuned, weights_source={"kind": "file", "where": "gone.pth"})
    engine = _load_engine(alone, PATH, weights=None, choice=EAGER)
    np.testing.assert_allclose(
        finetuned.head.logits(engine.embed(canary_pixels(224))), finetuned.canary_logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_engine__of_a_fine_tuned_model_of_another_architecture__is_refused(finetuned: Model, change: str) -> None:
    tensors = dict(finetuned.backbone_tensors)
    name = next(iter(tensors))
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["more.weight"] = np.zeros(3, np.float32)
    else:
        tensors[name] = tensors[name][:1]
    with pytest.raises(ModelError, match=r"model\.safetensors: its backbone is not a mobilenet_v3_small \("):
        _load_engine(replace(finetuned, backbone_tensors=tensors), PATH, weights=None, choice=EAGER)


def test_engine__of_a_fine_tuned_model_with_a_nan__is_refused(finetuned: Model) -> None:
    tensors = {name: tensor.copy() for name, tensor in finetuned.backbone_tensors.items()}
    next(iter(tensors.values())).flat[0] = np.nan
    with pytest.raises(ModelError, match="logits differ"):
        _load_engine(replace(finetuned, backbone_tensors=tensors), PATH, weights=None, choice=EAGER)


def test_engine__of_another_random_network__is_refused(finetuned: Model) -> None:
    with seeded(7):
        other = mobilenet_v3_small(weights=None).state_dict()
    tensors = {name: other[name].numpy() for name in finetuned.backbone_tensors}
    # Random networks embed images near zero: what the logits differ by there must count.
    assert np.ptp(finetuned.canary_logits, axis=0).max() < 1e-3
    with pytest.raises(ModelError, match="logits differ"):
        _load_engine(replace(finetuned, backbone_tensors=tensors), PATH, weights=None, choice=EAGER)
