from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.backbones.weights import read_state, weights_digest
from transfercache.errors import WeightsError

State = dict[str, torch.Tensor]


def small_tensors() -> State:
    return {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a.index": torch.tensor([1, -1], dtype=torch.int64),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "a.num_batches_tracked": torch.tensor(12),
    }


# ---- digest


def test_weights_digest__is_a_golden_value() -> None:
    assert weights_digest(small_tensors()) == ("f16fe5acb2153c40464463d01a31dfd3266f413abdf15c8b74c17520695719f1")


def test_weights_digest__hashes_the_bytes_that_its_docstring_states() -> None:
    expected = hashlib.sha256(
        b"a.index\0int64\x002\0"
        + np.array([1, -1], "<i8").tobytes()
        + b"b.weight\0float32\x002,3\0"
        + np.arange(6, dtype="<f4").tobytes()
        + b"scale\0bfloat16\0\0\x00\x3f"
    )
    assert weights_digest(small_tensors()) == expected.hexdigest()


def test_weights_digest__leaves_out_counters() -> None:
    tensors = small_tensors()
    digest = weights_digest(tensors)
    assert weights_digest({**tensors, "a.num_batches_tracked": torch.tensor(99)}) == digest
    assert weights_digest({**tensors, "fc.weight": torch.ones(2)}) != digest


@pytest.mark.parametrize(
    "changed",
    [
        {"b.weight": torch.arange(6, dtype=torch.float32).reshape(3, 2)},
        {"b.weight": torch.arange(6, dtype=torch.float64).reshape(2, 3)},
        {"b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) + torch.tensor([0, 0, 1e-6])},
    ],
    ids=["shape", "dtype", "value"],
)
def test_weights_digest__changes_with(changed: State) -> None:
    assert weights_digest({**small_tensors(), **changed}) != weights_digest(small_tensors())


def test_weights_digest__ignores_memory_format_and_order() -> None:
    tensor = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = {"a": tensor, "b": tensor + 1}
    other = {"b": (tensor + 1).to(memory_format=torch.channels_last), "a": tensor.to(memory_format=torch.channels_last)}
    assert weights_digest(plain) == weights_digest(other)


def test_digest__of_a_backbone_ignores_the_head_and_counters_only(resnet18_state: State, tmp_path: Path) -> None:
    def digest(**changed: torch.Tensor) -> str:
        path = tmp_path / "changed.pth"
        torch.save({**resnet18_state, **{name.replace("__", "."): value for name, value in changed.items()}}, path)
        return load_backbone("resnet18", weights=str(path)).weights_digest

    conv = resnet18_state["layer3.0.conv1.weight"].clone()
    conv[5, 4, 1, 2] += 1e-3
    unchanged = digest()
    assert digest(fc__weight=torch.zeros(1000, 512), fc__bias=torch.ones(1000)) == unchanged
    assert digest(bn1__num_batches_tracked=torch.tensor(1234)) == unchanged
    assert digest(layer3__0__conv1__weight=conv) != unchanged


# ---- files


def test_load_backbone__from_a_file_holds_its_tensors(resnet18_state: State, resnet18_file: Path) -> None:
    backbone = load_backbone("resnet18", weights=str(resnet18_file))
    loaded = backbone.network.state_dict()
    assert set(loaded) == {name for name in resnet18_state if not name.startswith("fc.")}
    assert all(torch.equal(loaded[name], resnet18_state[name]) for name in loaded)
    assert backbone.classifier is not None
    assert torch.equal(backbone.classifier.weight, resnet18_state["fc.weight"])
    assert backbone.weights_source == {"kind": "file", "where": str(resnet18_file), "licence": "not known to tlc"}


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "model", "DataParallel", "half", "no counters"])
def test_load_backbone__reads_the_other_forms_of_a_file(form: str, resnet18_state: State, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        safetensors.torch.save_file(resnet18_state, path)
    elif form in ("state_dict", "model"):
        torch.save({form: resnet18_state, "epoch": 3}, path)
    elif form == "DataParallel":
        torch.save({f"module.{name}": value for name, value in resnet18_state.items()}, path)
    elif form == "half":
        torch.save(
            {name: value.half() if value.is_floating_point() else value for name, value in resnet18_state.items()}, path
        )
    else:
        torch.save({name: value for name, value in resnet18_state.items() if "num_batches" not in name}, path)

    loaded = load_backbone("resnet18", weights=str(path)).network.state_dict()
    expected = resnet18_state["layer4.1.conv2.weight"]
    atol = 1e-3 if form == "half" else 0
    torch.testing.assert_close(loaded["layer4.1.conv2.weight"], expected, rtol=0, atol=atol)
    assert loaded["conv1.weight"].dtype == torch.float32


@pytest.mark.parametrize("n_classes", [None, 2])
def test_load_backbone__takes_a_file_without_the_head_or_with_another(
    n_classes: int | None, resnet18_state: State, resnet18_file: Path, tmp_path: Path
) -> None:
    state = {name: value for name, value in resnet18_state.items() if not name.startswith("fc.")}
    if n_classes is not None:
        state |= {"fc.weight": torch.zeros(n_classes, 512), "fc.bias": torch.zeros(n_classes)}
    torch.save(state, tmp_path / "own.pth")
    backbone = load_backbone("resnet18", weights=str(tmp_path / "own.pth"))
    assert backbone.classifier is None
    assert backbone.dim == 512
    assert backbone.weights_digest == load_backbone("resnet18", weights=str(resnet18_file)).weights_digest


def test_load_backbone__of_another_architecture_names_what_differs(resnet18_file: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_backbone("resnet50", weights=str(resnet18_file))
    message = str(caught.value)
    assert message.startswith(f"{resnet18_file} as resnet50: weights of another architecture: ")
    assert "165 missing (layer1.0.conv3.weight, layer1.0.bn3.weight, layer1.0.bn3.bias, ...)" in message
    assert "of another shape (layer1.0.conv1.weight, layer1.1.conv1.weight, layer2.0.conv1.weight, ...)" in message
    assert caught.value.exit_code == 5


def test_load_backbone__of_another_family_names_unexpected_tensors(resnet18_file: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"missing \(features\.0\.weight, .* 60 unexpected|unexpected \(conv1\.weight, "
    ):
        load_backbone("alexnet", weights=str(resnet18_file))


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("print('owned')",))


def hostile_files(folder: Path) -> dict[str, Path]:
    contents = {
        "text.pth": b"<html>not found</html>",
        "empty.pth": b"",
        "code.pth": pickle.dumps(RunsCode()),
        "text.safetensors": b"<html>not found</html>",
        "torn.pth": b"PK\x03\x04" + b"\0" * 100,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save({"weight": RunsCode()}, folder / "code_in_zip.pth")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["text.pth", "empty.pth", "code.pth", "code_in_zip.pth", "torn.pth", "text.safetensors"]
)
def test_read_state__of_what_is_no_weights_file_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hostile_files(tmp_path)[name]
    with pytest.raises(WeightsError, match=f"{name}: not a .*file") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    assert "owned" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {1: torch.zeros(1)}], ids=str)
def test_read_state__of_other_objects_says_what_is_wanted(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: holds no state_dict .*model\.state_dict\(\)"):
        read_state(tmp_path / "x.pth")


def test_read_state__of_a_missing_file_says_what_weights_takes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: no such file; --weights takes DEFAULT, random, or"):
        load_backbone("resnet18", weights=str(tmp_path / "absent.pth"))


# ---- names of older torchvision versions, and layers that are not built


def saved_by_older_torchvision(name: str) -> tuple[State, State]:
    """A state_dict as it is today, and under the names that published files have."""
    with torch.random.fork_rng(devices=[]):
        network = torchvision.models.get_model(
            name, weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
    now = network.state_dict()
    old = OrderedDict()
    for key, value in now.items():
        older = key
        for layer in ("norm1.", "norm2.", "conv1.", "conv2."):
            older = older.replace(f".{layer}", f".{layer[:-2]}.{layer[-2:]}") if name == "densenet121" else older
        if name == "vit_b_32":
            older = older.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")
        old[older] = value
    return now, old


@pytest.mark.parametrize(("name", "n_other"), [("densenet121", 696), ("vit_b_32", 48), ("googlenet", 0)])
def test_load_backbone__reads_published_names(name: str, n_other: int, tmp_path: Path) -> None:
    now, old = saved_by_older_torchvision(name)
    assert len(set(old) - set(now)) == n_other
    torch.save(old, tmp_path / "old.pth")
    loaded = load_backbone(name, weights=str(tmp_path / "old.pth")).network.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in loaded.items())
    assert not any(key.startswith("aux") for key in loaded)


# ---- DEFAULT


def plant(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_default__hashes_a_file_that_is_already_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = plant(b"not the weights", monkeypatch, tmp_path)
    with pytest.raises(WeightsError, match=r"its SHA-256 is [0-9a-f]{8}, expected f37072fd; remove it") as caught:
        load_backbone("resnet18")
    assert str(path) in str(caught.value)
    assert "--weights PATH" in str(caught.value)
    assert path.read_bytes() == b"not the weights"
    assert caught.value.exit_code == 5


def test_default__loads_a_file_whose_digest_is_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resnet18_file: Path, resnet18_state: State
) -> None:
    """The published file is not at hand, so its stand-in is published under its own digits."""
    digits = hashlib.sha256(resnet18_file.read_bytes()).hexdigest()[:8]
    weights = torchvision.models.ResNet18_Weights.DEFAULT.value
    monkeypatch.setattr(weights, "url", f"https://download.pytorch.org/models/resnet18-{digits}.pth")
    planted = plant(resnet18_file.read_bytes(), monkeypatch, tmp_path)
    planted.rename(planted.with_name(f"resnet18-{digits}.pth"))

    backbone = load_backbone("resnet18")
    assert torch.equal(backbone.network.state_dict()["conv1.weight"], resnet18_state["conv1.weight"])
    assert backbone.weights_source["kind"] == "default"
    assert backbone.weights_source["where"].endswith(f"resnet18-{digits}.pth")


def test_default__unreachable_names_the_url_and_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT.value
    monkeypatch.setattr(weights, "url", "http://127.0.0.1:9/resnet18-f37072fd.pth")  # nothing listens there
    with pytest.raises(WeightsError) as caught:
        load_backbone("resnet18")
    message = str(caught.value)
    assert "http://127.0.0.1:9/resnet18-f37072fd.pth" in message
    assert message.endswith(", or pass --weights PATH")
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert caught.value.exit_code == 5


def test_digest__of_published_weights_file_names_is_found_for_every_model() -> None:
    from transfercache.backbones.torchvision_adapter import _DIGITS, torchvision_names

    urls = [torchvision.models.get_model_weights(name).DEFAULT.url for name in torchvision_names()]
    assert [url for url in urls if _DIGITS.search(url) is None] == []


@pytest.mark.real
def test_digest__of_the_real_weights_is_a_golden_value(real_weights: Path) -> None:
    backbone: Backbone = load_backbone("resnet18", weights=str(real_weights))
    assert backbone.weights_digest == "d7aa81fb95d9f5c4d323b5e5cdf447f4da4c66c710c5812c607c618fea38bd6a"
