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


def test_document__its_checksum_is_tlcs(tmp_path: Path, extraction: Any, blocks: list[str]) -> None:
    names: dict[str, Any] = {"np": np}
    exec(blocks[0], names)
    views = np.arange(10, dtype=np.uint8)
    expected = row_checksums(np.arange(10), views, extraction.digests, extraction.features)
    np.testing.assert_array_equal(names["row_checksums"](extraction.digests, views, extraction.features), expected)


def test_document__golden_checksum() -> None:
    stated = re.search(r"have the checksum `(0x[0-9a-f]{16})`", DOCUMENT.read_text())
    digest = np.arange(32, dtype=np.uint8)[None]
    features = np.array([[1.0, -2.5, 0.0]], np.float32)
    made = row_checksums(np.array([5]), np.array([1], np.uint8), digest, features)
    assert stated is not None
    assert int(stated[1], 16) == int(made[0]) == 0x5AAB8B2F1C1C61BA


def test_shard__h5py_sees_what_tlc_serves(finished: Path) -> None:
    table = open_cache(finished).table()
    (entry,) = read_catalogue(finished).shards
    with h5py.File(finished / entry.file, "r") as file:
        np.testing.assert_array_equal(file["features"][:], table.features)
        assert file["checksums"][:].all()
