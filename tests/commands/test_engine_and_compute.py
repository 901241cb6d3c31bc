"""What `engine` and `compute` do from extraction to prediction: one is provenance, the other identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.backbones import available
from transfercache.backbones.available import bf16_units, is_openvino_installed
from transfercache.backbones.choice import choose_engine
from transfercache.commands.compare import compare
from transfercache.commands.extract import Extraction, extract_features
from transfercache.commands.predict import predict
from transfercache.commands.train import train_head
from transfercache.errors import CacheError, ResourceError, UsageError

needs_openvino = pytest.mark.skipif(not is_openvino_installed(), reason="the extra `openvino` is not installed")
needs_bf16 = pytest.mark.skipif(not bf16_units(), reason="this processor has no bfloat16 units")


@pytest.fixture(scope="module")
def half(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """The cache of `pets` in bfloat16, and in the same folder that in float32; never to be changed."""
    folder = tmp_path_factory.mktemp("half")
    extract_features(pets, weights="random", device="cpu", cache_dir=folder)
    return extract_features(pets, weights="random", device="cpu", compute="bf16", cache_dir=folder)


def test_on_engine__is_told_before_the_first_image_and_not_where_all_is_there(pets: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def extract() -> Extraction:
        return extract_features(
            pets, backbone="mobilenet_v3_small", weights="random", cache_dir=tmp_path, on_engine=lines.append
        )

    extract()
    assert lines == [choose_engine(device="auto").describe()]
    assert extract().computed == 0
    assert len(lines) == 1


@needs_openvino
def test_engine__is_provenance__its_rows_are_checked_against_the_other_and_kept(pets: Path, tmp_path: Path) -> None:
    def extract(engine: Any) -> Extraction:
        return extract_features(
            pets, backbone="mobilenet_v3_small", weights="random", device="cpu", engine=engine, cache_dir=tmp_path
        )

    eager = extract("eager")
    assert (eager.engine, eager.computed, eager.checked) == ("eager", 16, 0)
    other = extract("openvino")
    assert (other.cache, other.engine, other.computed, other.checked) == (eager.cache, "openvino", 0, 8)
    first, second = other.open().provenance
    assert (first.makers["engine"], "openvino" in first.makers) == ("eager", False)
    assert second.makers == {**first.makers, "engine": "openvino", "openvino": second.versions["openvino"]}
    assert extract("openvino").checked == 0


@needs_bf16
def test_bf16__is_another_cache_whose_heads_say_so(half: Extraction, tmp_path: Path) -> None:
    full, own = sorted(half.cache.parent.iterdir(), key=lambda folder: folder == half.cache)
    assert own == half.cache
    assert (half.compute, half.computed, half.open().spec.compute) == ("bf16", 16, "bf16")
    rows, of_full = half.table(), extract_features(half.open().data_root, weights="random", cache_dir=full.parent)
    error = np.abs(rows.features - of_full.table().features).max() / np.abs(of_full.table().features).max()
    assert 1e-4 < error < 5e-2
    trained = train_head(half, C=1.0, out=tmp_path / "head.safetensors")
    assert trained.linear_head is not None
    assert trained.linear_head.spec.compute == "bf16"
    with pytest.raises(CacheError, match=r"not of the spec that .* was trained on .compute fp32 against bf16"):
        predict(tmp_path / "head.safetensors", full)


@needs_bf16
def test_predict__of_a_bf16_model__computes_in_bf16(
    half: Extraction, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = train_head(half, C=1.0, out=tmp_path / "head.safetensors").head
    assert head is not None
    kept = predict(head, half.cache).images
    fresh = predict(head, [pets], device="cpu", cache_dir=tmp_path / "none").images
    np.testing.assert_allclose(
        [image.probability for image in fresh], [image.probability for image in kept], rtol=1e-3, atol=1e-6
    )
    # Elsewhere it is refused, rather than computed otherwise; what a cache holds can still be read.
    monkeypatch.setattr(available, "processor_flags", set)
    with pytest.raises(ResourceError, match=r"head.*: computes in bf16 \(--compute bf16: .* has no bfloat16 units"):
        predict(head, [pets], device="cpu", cache_dir=tmp_path / "none")
    assert predict(head, half.cache).images == kept


@pytest.mark.parametrize("command", [extract_features, compare])
def test_what_cannot_be__is_refused_before_anything_is_read(command: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--engine compile: torch\.compile is for NVIDIA GPUs here"):
        command(tmp_path / "none", device="cpu", engine="compile")
    with pytest.raises(ResourceError, match="--compute fp16: it needs an NVIDIA GPU"):
        command(tmp_path / "none", device="cpu", compute="fp16")
