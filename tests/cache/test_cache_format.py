"""docs/cache-format.md is a contract: its code runs here, and reads what tlc wrote."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.shard import row_checksums

DOCUMENT = Path(__file__).parents[2] / "docs" / "cache-format.md"


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_document__its_last_ten_lines_read_a_shard(
    tmp_path: Path, make_extraction: Any, blocks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = make_extraction(bad=4)
    folder = extraction.run(tmp_path)
    assert len(blocks[-1].splitlines()) == 10
    assert DOCUMENT.read_text().endswith(blocks[-1] + "```\n")
    monkeypatch.setattr(sys, "argv", ["read.py", str(folder)])
    names: dict[str, Any] = {}
    exec(blocks[-1], names)
    good = np.arange(10) != 4
    np.testing.assert_array_equal(names["written"], good)
    np.testing.assert_array_equal(names["features"][good], extraction.features[good])
    np.testing.assert_array_equal(names["features"][good], open_cache(folder).table().features)
    np.testing.assert_array_equal(names["digests"], extraction.digests)
    assert names["views"].tolist() == [0] * 10


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("dim", [5, 6])
def test_document__its_checksum_is_tlcs(extraction: Any, blocks: list[str], dtype: str, dim: int) -> None:
    names: dict[str, Any] = {"np": np}
    exec(blocks[0], names)
    views, features = np.arange(10, dtype=np.uint8), np.ascontiguousarray(extraction.features[:, :dim], dtype)
    expected = row_checksums(np.arange(10), views, extraction.digests, features)
    np.testing.assert_array_equal(names["row_checksums"](extraction.digests, views, features), expected)


@pytest.mark.parametrize(("dtype", "golden"), [("float32", 0x5AAB8B2F1C1C61BA), ("float16", 0x39F509A2E77E45BA)])
def test_document__golden_checksum(dtype: str, golden: int) -> None:
    stated = re.search(rf"`(0x[0-9a-f]{{16}})` as\s+{dtype}", DOCUMENT.read_text())
    digest = np.arange(32, dtype=np.uint8)[None]
    features = np.array([[1.0, -2.5, 0.0]], dtype)
    made = row_checksums(np.array([5]), np.array([1], np.uint8), digest, features)
    assert stated is not None
    assert int(stated[1], 16) == int(made[0]) == golden


def test_shard__h5py_sees_what_tlc_serves(finished: Path) -> None:
    table = open_cache(finished).table()
    (entry,) = read_catalogue(finished).shards
    with h5py.File(finished / entry.file, "r") as file:
        np.testing.assert_array_equal(file["features"][:], table.features)
        assert file["checksums"][:].all()
