from __future__ import annotations

import json
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from transfercache.errors import ModelError, ResourceError
from transfercache.heads.linear_head import UNTRAINED_BIAS
from transfercache.models.head_file import Model, check_canaries, load_model, save_model


def _parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(file.metadata()["tlc"])


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: Any) -> Path:
    safetensors.numpy.save_file(tensors, path, {"tlc": json.dumps(metadata)})
    return path


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_round_trip__gives_every_part_back(model: Model, saved: Path) -> None:
    loaded = load_model(saved)
    np.testing.assert_array_equal(loaded.head.weight, model.head.weight)
    np.testing.assert_array_equal(loaded.head.bias, model.head.bias)
    np.testing.assert_array_equal(loaded.canary_logits, model.canary_logits)
    for name in ("class_names", "spec", "solver", "chosen", "n_train", "temperature"):
        assert getattr(loaded.head, name) == getattr(model.head, name)
    assert (loaded.weights_source, loaded.reported) == (model.weights_source, model.reported)
    assert not loaded.is_finetuned


def test_round_trip__of_a_fine_tuned_model__keeps_every_tensor(finetuned: Model, tmp_path: Path) -> None:
    save_model(finetuned, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.is_finetuned
    assert loaded.backbone_tensors.keys() == finetuned.backbone_tensors.keys()
    for name, tensor in finetuned.backbone_tensors.items():
        np.testing.assert_array_equal(loaded.backbone_tensors[name], tensor, strict=True)


def test_round_trip__of_a_bundled_model__keeps_the_frozen_tensors_apart(
    model: Model, finetuned: Model, tmp_path: Path
) -> None:
    save_model(replace(model, bundled_tensors=finetuned.backbone_tensors), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.is_finetuned
    assert loaded.backbone_tensors == {}
    assert loaded.bundled_tensors.keys() == finetuned.backbone_tensors.keys()
    for name, tensor in finetuned.backbone_tensors.items():
        np.testing.assert_array_equal(loaded.bundled_tensors[name], tensor, strict=True)


def test_save__makes_folders_and_replaces_the_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a/b/head.safetensors"
    save_model(model, path)
    first = path.read_bytes()
    save_model(replace(model, reported=None), path)
    assert load_model(path).reported is None
    assert path.read_bytes() != first
    assert [item.name for item in path.parent.iterdir()] == ["head.safetensors"]


def test_save__equal_models__are_equal_files(model: Model, tmp_path: Path) -> None:
    for name in "ab":
        save_model(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_save__where_it_may_not_write(model: Model, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ResourceError, match=r"taken/head: cannot be written \((Not a directory|File exists)\)"):
        save_model(model, tmp_path / "taken" / "head")
    with pytest.raises(ResourceError, match=r"cannot be written \(Is a directory\)"):
        save_model(model, tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 4, 8, 100, -1])
def test_load__of_a_torn_file(saved: Path, n_bytes: int) -> None:
    saved.write_bytes(saved.read_bytes()[:n_bytes])
    with pytest.raises(ModelError, match=r"head\.safetensors: not a model of tlc \("):
        load_model(saved)


def test_load__of_what_is_not_there_or_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError, match="no such model file; train-head and finetune write one"):
            load_model(path)


def test_load__of_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match="not a model of tlc"):
        load_model(path)


def test_load__of_another_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"fc.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(ModelError, match=r"not a model of this tlc \(it has no tlc metadata\); train it again"):
        load_model(path)


def test_load__of_a_dtype_that_numpy_lacks(saved: Path) -> None:
    # A bfloat16 tensor is a valid file for others.
    header = json.dumps({"head.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    saved.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(ModelError, match="not a model of"):
        load_model(saved)


def test_load__of_another_schema(saved: Path) -> None:
    tensors, description = _parts(saved)
    _write(saved, tensors, {**description, "schema_version": 2})
    with pytest.raises(ModelError, match="schema 2, this tlc reads 1"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"]}, "canary_logits must be finite float32"),
        ({"class_names": ["a", "a", "b"]}, "class_names must be two or more different names"),
        ({"class_names": "abc"}, "class_names is a str"),
        ({"class_names": [1, 2, 3]}, "class_names must hold str values alone"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": 1}, "temperature is a int"),
        ({"temperature": float("nan")}, "NaN is not JSON"),
        ({"n_train": "12"}, "n_train is a str"),
        ({"n_train": True}, "n_train is a bool"),
        ({"n_train": 0}, "n_train at least 1"),
        ({"chosen": []}, "chosen is a list"),
        ({"solver": None}, "solver is a NoneType"),
        ({"weights_source": "here"}, "weights_source is a str"),
        ({"weights_source": {"kind": "file", "where": 5}}, "weights_source must"),
        ({"reported": 3}, "reported is a int"),
        ({"spec": {}}, "ExtractSpec has the fields"),
        ({"spec": None}, "spec is a NoneType"),
    ],
)
def test_load__of_a_description_that_lies(saved: Path, change: dict[str, Any], message: str) -> None:
    tensors, description = _parts(saved)
    _write(saved, tensors, {**description, **change})
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    "name",
    ["class_names", "spec", "solver", "chosen", "n_train", "temperature", "weights_source", "reported"],
)
def test_load__of_a_description_that_lacks_a_field(saved: Path, name: str) -> None:
    tensors, description = _parts(saved)
    del description[name]
    _write(saved, tensors, description)
    with pytest.raises(ModelError, match=name):
        load_model(saved)


@pytest.mark.parametrize("value", [[], 5, None, "x"])
def test_load__of_a_description_that_is_no_object(saved: Path, value: Any) -> None:
    tensors, _ = _parts(saved)
    _write(saved, tensors, value)
    with pytest.raises(ModelError, match="its metadata has the fields"):
        load_model(saved)


def test_load__of_a_description_nested_without_end(saved: Path) -> None:
    tensors, _ = _parts(saved)
    safetensors.numpy.save_file(tensors, saved, {"tlc": "[" * 200_000})
    with pytest.raises(ModelError, match="not a model of this tlc"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_load__of_a_description_that_is_no_json(saved: Path, text: str) -> None:
    tensors, _ = _parts(saved)
    safetensors.numpy.save_file(tensors, saved, {"tlc": text})
    with pytest.raises(ModelError, match="not a model of this tlc"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head.weight", np.full((3, 1024), np.nan, np.float32), "weight must be finite float32"),
        ("head.weight", np.zeros((3, 1024), np.float64), "weight must be finite float32"),
        ("head.weight", np.zeros((2, 1024), np.float32), "weight"),
        ("head.weight", np.zeros(3, np.float32), "weight"),
        ("head.bias", np.zeros(2, np.float32), "bias"),
        ("head.bias", np.full(3, np.inf, np.float32), "bias must be finite float32"),
        ("canary_logits", np.zeros((3, 3), np.float32), "canary_logits must be finite float32"),
        ("canary_logits", np.full((4, 3), np.nan, np.float32), "canary_logits must be finite float32"),
    ],
)
def test_load__of_tensors_that_lie(saved: Path, name: str, value: np.ndarray, message: str) -> None:
    tensors, description = _parts(saved)
    _write(saved, {**tensors, name: value}, description)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "canary_logits"])
def test_load__of_a_file_without_a_tensor(saved: Path, name: str) -> None:
    tensors, description = _parts(saved)
    del tensors[name]
    _write(saved, tensors, description)
    with pytest.raises(ModelError, match=name):
        load_model(saved)


def test_canaries__within_rounding__pass(model: Model) -> None:
    path = Path("head.safetensors")
    embeddings = np.random.default_rng(1).normal(size=(4, 1024)).astype(np.float32)
    model = replace(model, canary_logits=model.head.logits(embeddings))
    check_canaries(path, model, embeddings * np.float32(1 + 1e-4))
    with pytest.raises(ModelError, match="logits differ from those it was saved with by"):
        check_canaries(path, model, embeddings * np.float32(1.1))
    with pytest.raises(ModelError, match="logits differ"):
        check_canaries(path, model, np.full_like(embeddings, np.nan))
    with pytest.raises(ModelError, match="its head takes 1024 features, but its backbone gives 5; train it again"):
        check_canaries(path, model, np.zeros((4, 5), np.float32))


def test_canaries__of_an_untrained_class__do_not_hide_the_others(model: Model) -> None:
    weight, bias = model.head.weight.copy(), model.head.bias.copy()
    weight[1], bias[1] = 0, UNTRAINED_BIAS
    head = replace(model.head, weight=weight / np.float32(100), bias=bias)
    embeddings = np.random.default_rng(1).normal(size=(4, 1024)).astype(np.float32)
    model = replace(model, head=head, canary_logits=head.logits(embeddings))
    check_canaries(Path("head"), model, embeddings * np.float32(1 + 1e-4))
    with pytest.raises(ModelError, match="logits differ"):
        check_canaries(Path("head"), model, embeddings * np.float32(1.1))


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_canaries__of_embeddings_of_any_size__tell_networks_apart(model: Model, size: float) -> None:
    first, second = (np.random.default_rng(seed).normal(0, size, (4, 1024)).astype(np.float32) for seed in (1, 2))
    head = replace(model.head, weight=model.head.weight / np.float32(3200 * size), bias=np.zeros(3, np.float32))
    model = replace(model, head=head, canary_logits=head.logits(first))
    check_canaries(Path("head"), model, first * np.float32(1 + 1e-5))
    with pytest.raises(ModelError, match="logits differ"):
        check_canaries(Path("head"), model, second)


def test_saved_file__is_readable_by_others(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) & 0o444 == 0o444
