"""A reader written from docs/cache-format.md alone reads what the package writes, and refuses what the page forbids."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import transfercache
from transfercache.cache.reader import open_cache

# A cache made by hand from the page: two good images, the first of them in views 0 and 1, and a bad one. Features of
# dim 3 in float16, so that a row ends amid a word of its checksum; a shard whose number (3) is not its index (0).

# The digests of the two images are taken to be the bytes 0 to 31 and 32 to 63. Outside its datasets the file is free.
SHARD = (
    b"Free bytes, where an HDF5 file has its metadata: read not them. "  # to byte 64
    + bytes.fromhex("003c00c10000")  # at 64, features: 1.0, -2.5, 0.0 as binary16, little-endian
    + bytes.fromhex("0038ff7b0080")  # 0.5, 65504.0 (the largest), -0.0
    + bytes.fromhex("010000bc5535")  # 2^-24 (the smallest), -1.0, 0x3555: 0.333251953125
    + bytes(46)  # to the next multiple of 64, which is 128; digests of the image of each slot:
    + bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    + bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    + bytes.fromhex("202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f")
    + bytes(32)  # to 256
    + bytes.fromhex("000100")  # views
    + bytes(61)  # to 320; checksums by the page's `row_checksums`, little-endian:
    + bytes.fromhex("00fcdfff6a638dc8feb251079110a5acac69643cb272e18c")
)
# The header's length, the header in the order of the page's table, and the arrays one after another, little-endian.
ROWS_HEADER = (
    b'{"path_bytes":{"dtype":"U8","shape":[38],"data_offsets":[0,38]},'
    b'"path_offsets":{"dtype":"I64","shape":[5],"data_offsets":[38,78]},'
    b'"size":{"dtype":"I64","shape":[4],"data_offsets":[78,110]},'
    b'"mtime_ns":{"dtype":"I64","shape":[4],"data_offsets":[110,142]},'
    b'"ctime_ns":{"dtype":"I64","shape":[4],"data_offsets":[142,174]},'
    b'"inode":{"dtype":"I64","shape":[4],"data_offsets":[174,206]},'
    b'"digest":{"dtype":"U8","shape":[4,32],"data_offsets":[206,334]},'
    b'"view":{"dtype":"U8","shape":[4],"data_offsets":[334,338]},'
    b'"label":{"dtype":"I64","shape":[4],"data_offsets":[338,370]},'
    b'"split":{"dtype":"U8","shape":[4],"data_offsets":[370,374]},'
    b'"group":{"dtype":"I64","shape":[4],"data_offsets":[374,406]},'
    b'"status":{"dtype":"U8","shape":[4],"data_offsets":[406,410]},'
    b'"reason_bytes":{"dtype":"U8","shape":[14],"data_offsets":[410,424]},'
    b'"reason_offsets":{"dtype":"I64","shape":[5],"data_offsets":[424,464]},'
    b'"shard":{"dtype":"I32","shape":[4],"data_offsets":[464,480]},'
    b'"slot":{"dtype":"I64","shape":[4],"data_offsets":[480,512]}}'
    b"     "
)
ROWS = (
    bytes.fromhex("f003000000000000")  # 1008
    + ROWS_HEADER
    + b"ant/\xc3\xa9.png"
    + b"ant/\xc3\xa9.png"
    + b"bee/\xff.png"
    + b"bee/2.png"  # an é in UTF-8; no UTF-8 at all
    + bytes.fromhex("00000000000000000a0000000000000014000000000000001d000000000000002600000000000000")  # 0 10 20 29 38
    + bytes.fromhex("0001000000000000000100000000000001010000000000000000000000000000")  # size: 256 256 257 0
    + bytes.fromhex("ffffffffffffffffffffffffffffffff00ca9a3b000000000000000000000000")  # mtime_ns: -1 -1 10^9 0
    + bytes.fromhex("0500000000000000050000000000000006000000000000000000000000000000")  # ctime_ns: 5 5 6 0
    + bytes.fromhex("0700000000000000070000000000000008000000000000000000000000000000")  # inode: 7 7 8 0
    + bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")  # digest, as in the shard
    + bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    + bytes.fromhex("202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f")
    + bytes(32)  # the third image could not be read
    + bytes.fromhex("00010000")  # view
    + bytes.fromhex("000000000000000000000000000000000100000000000000ffffffffffffffff")  # label: 0 0 1 -1
    + bytes.fromhex("01010200")  # split: train train val none
    + bytes.fromhex("0000000000000000000000000000000001000000000000000200000000000000")  # group: 0 0 1 2
    + bytes.fromhex("00000001")  # status: the last is bad
    + b"cannot be read"  # its reason
    + bytes.fromhex("00000000000000000000000000000000000000000000000000000000000000000e00000000000000")  # 0 0 0 0 14
    + bytes.fromhex("030000000300000003000000ffffffff")  # shard: 3 3 3 -1
    + bytes.fromhex("000000000000000001000000000000000200000000000000ffffffffffffffff")  # slot: 0 1 2 -1
)
# Three floats a canary: 1, 0, -1 is 3f800000, 00000000, bf800000, each from its low byte. The digests are those that
# `sha256sum` prints of the two files above, and the checksum that of the text after the first newline. The page does
# not list the keys of a spec; these are what tlc asks for.
CATALOGUE = """{"checksum":"d39b3751f1e501bdcf7901a784f4e7aa67bb634ff8909ab2e74bec752c0c8ae1",
"format": "transfercache", "schema_version": 1,
"spec": {"backbone": "resnet18", "boundary": "pooled", "compute": "fp32", "storage_dtype": "float16",
 "preprocessing": {"resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406],
  "std": [0.229, 0.224, 0.225], "antialias": true, "colour": "rgb,grey16-scaled", "exif": "applied",
  "decoder": "pillow"},
 "schema_version": 1, "view_policy": "eval,mirror,augment/1",
 "weights_digest": "abababababababababababababababababababababababababababababababab"},
"data_name": "golden", "data_root": "/data/golden", "class_names": ["ant", "bee"], "has_given_split": true,
"canaries": ["0000803f00000000000080bf", "0000003f0000803e00000040", "000000c000004040000040c0",
 "0000c03f000000bf00008040"],
"shards": [{"file": "shard-00003.h5", "n_rows": 3, "dim": 3, "dtype": "float16", "batch_size": 2,
 "features": {"offset": 64, "length": 18}, "digests": {"offset": 128, "length": 96},
 "views": {"offset": 256, "length": 3}, "checksums": {"offset": 320, "length": 24}, "finished": true,
 "digest": "d9e55411372808ea4b9ab81f77fde2c3e999d05246b3c8800bde1615d5d478fb"}],
"rows": {"file": "rows-4485413b.safetensors",
 "sha256": "4485413ba691c4f7ebb07a750fd75e52a952481ec04fa3ea8508c9cf67a2ec83"},
"provenance": [{"date": "2026-01-02T03:04:05+00:00", "computed": 3, "reused": 0, "checked": 0, "copied_from": null,
 "seconds": {"total": 1.5}, "engine": "eager", "device": "cpu", "batch_size": 2, "weights": {"kind": "random"},
 "machine": {"cores": 2, "processor": "made"}, "versions": {"torch": "2.9"}}]}
"""
SHARD_FILE, ROWS_FILE = "shard-00003.h5", "rows-4485413b.safetensors"
FILES = {"catalogue.json": CATALOGUE.encode(), ROWS_FILE: ROWS, SHARD_FILE: SHARD}
FEATURES = [(1.0, -2.5, 0.0), (0.5, 65504.0, -0.0), (2.0**-24, -1.0, 0.333251953125)]
CANARIES = [[1.0, 0.0, -1.0], [0.5, 0.25, 2.0], [-2.0, 3.0, -3.0], [1.5, -0.5, 4.0]]

COLUMNS = ("size", "mtime_ns", "ctime_ns", "inode", "view", "label", "split", "group", "status", "shard", "slot")


@pytest.fixture(scope="module")
def reader() -> Iterator[ModuleType]:
    """The reader beside this file, which is no module of the package."""
    spec = importlib.util.spec_from_file_location(
        "reader_from_document", Path(__file__).with_name("reader_from_document.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    folder = tmp_path / "golden-resnet18-pooled-0fca349a"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def sign_text(folder: Path, text: bytes) -> None:
    """Write a catalogue of this text after the first line, with a right checksum."""
    first = b'{"checksum":"%s",\n' % hashlib.sha256(text).hexdigest().encode()
    (folder / "catalogue.json").write_bytes(first + text)


def sign_rows(folder: Path, rows: bytes, rewrite: Callable[..., None]) -> None:
    """Replace the rows file as a forger would, with right digests."""
    sha256 = hashlib.sha256(rows).hexdigest()
    name = f"rows-{sha256[:8]}.safetensors"
    (folder / name).write_bytes(rows)
    rewrite(folder, lambda catalogue: catalogue.update(rows={"file": name, "sha256": sha256}))


def assert_reads_as_tlc(reader: ModuleType, folder: Path) -> None:
    mine, cache = reader.read_cache(folder), open_cache(folder)
    table, rows = cache.table(), cache.rows
    good = [entry for entry in mine.entries if entry.status == 0]
    assert (
        np.array([entry.features for entry in good], "f4").tobytes() == np.ascontiguousarray(table.features).tobytes()
    )
    assert [entry.path for entry in good] == [os.fsencode(path) for path in table.paths]
    for name, served in (("label", table.labels), ("split", table.split), ("view", table.view)):
        assert [getattr(entry, name) for entry in good] == served.tolist(), name
    for name in COLUMNS:
        assert [getattr(entry, name) for entry in mine.entries] == getattr(rows, name).tolist(), name
    assert [entry.digest for entry in mine.entries] == [digest.tobytes() for digest in rows.digest]
    for name in ("path", "reason"):
        assert [getattr(entry, name) for entry in mine.entries] == [os.fsencode(text) for text in getattr(rows, name)]
    assert np.array(mine.canaries, "f4").tobytes() == cache.canaries.tobytes()
    assert (mine.data_name, mine.data_root) == (cache.data_name, str(cache.data_root))
    assert mine.class_names == list(cache.class_names)
    assert mine.provenance == [asdict(run) for run in cache.provenance]
    assert mine.spec["backbone"] == cache.spec.backbone
    sorted_spec = json.dumps(mine.spec, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(sorted_spec).hexdigest()[:8] in folder.name.split("-")


def test_the_example_of_the_page(reader: ModuleType) -> None:
    features = (1.0, -2.5, 0.0)
    for dtype, checksum in (("<f4", 0x5AAB8B2F1C1C61BA), ("<f2", 0x39F509A2E77E45BA)):
        assert reader.row_checksum(5, 1, bytes(range(32)), np.array(features, dtype).tobytes()) == checksum


def test_a_sum_of_zero_is_one(reader: ModuleType) -> None:
    assert reader.row_checksum(0, 0, bytes(32), bytes(6)) == 1


def test_the_golden_cache_read_from_the_page(reader: ModuleType, golden: Path) -> None:
    cache = reader.read_cache(golden)
    assert (cache.data_name, cache.data_root, cache.class_names) == ("golden", "/data/golden", ["ant", "bee"])
    assert cache.canaries == CANARIES
    assert cache.spec["storage_dtype"] == "float16"
    assert [run["computed"] for run in cache.provenance] == [3]
    first, second = bytes(range(32)), bytes(range(32, 64))
    path, other, bad = b"ant/\xc3\xa9.png", b"bee/\xff.png", b"bee/2.png"
    Entry = reader.Entry
    assert cache.entries == [
        Entry(path, 256, -1, 5, 7, first, 0, 0, 1, 0, 0, b"", 3, 0, FEATURES[0]),
        Entry(path, 256, -1, 5, 7, first, 1, 0, 1, 0, 0, b"", 3, 1, FEATURES[1]),
        Entry(other, 257, 10**9, 6, 8, second, 0, 1, 2, 1, 0, b"", 3, 2, FEATURES[2]),
        Entry(bad, 0, 0, 0, 0, bytes(32), 0, -1, 0, 2, 1, b"cannot be read", -1, -1, None),
    ]


def test_the_golden_cache_read_by_tlc(reader: ModuleType, golden: Path) -> None:
    cache = open_cache(golden)
    table = cache.table()
    assert table.features.tolist() == [list(row) for row in FEATURES]
    assert [os.fsencode(path) for path in table.paths] == [b"ant/\xc3\xa9.png"] * 2 + [b"bee/\xff.png"]
    assert table.labels.tolist() == [0, 0, 1]
    assert table.split.tolist() == [1, 1, 2]
    assert table.view.tolist() == [0, 1, 0]
    assert cache.canaries.tolist() == CANARIES
    assert_reads_as_tlc(reader, golden)


def test_reads_what_is_written(reader: ModuleType, finished: Path) -> None:
    assert len(reader.read_cache(finished).entries) == 10
    assert_reads_as_tlc(reader, finished)


def test_reads_a_cache_with_a_bad_row(reader: ModuleType, make_extraction: Any, tmp_path: Path) -> None:
    folder = make_extraction(bad=3).run(tmp_path / "cache")
    assert [entry.features is None for entry in reader.read_cache(folder).entries] == [i == 3 for i in range(10)]
    assert_reads_as_tlc(reader, folder)


def test_an_extraction_that_has_not_ended_has_no_rows(reader: ModuleType, extraction: Any, tmp_path: Path) -> None:
    steps = extraction.steps(tmp_path / "cache")
    for step in steps:
        if step == "published":
            break
        (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
        assert reader.read_cache(folder).entries == [], step
    assert len(reader.read_cache(folder).entries) == 10
    steps.close()


def test_reads_a_real_extraction(reader: ModuleType, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for i, name in enumerate(("ant/0", "ant/1", "ant/2", "bee/0", "bee/1")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.png")
    shutil.copyfile(images / "ant/0.png", images / "ant/copy.png")  # shares the slots of the first
    (images / "bee/unreadable.png").write_bytes(b"no image")
    # resnet18, because float16 holds none of the tiny features of the other small backbones' random weights.
    result = transfercache.extract_features(
        images, backbone="resnet18", weights="random", views=3, storage_dtype="float16", cache_dir=tmp_path / "cache"
    )
    folder = Path(result.cache)
    entries = reader.read_cache(folder).entries
    good = [entry for entry in entries if entry.status == 0]
    assert [(entry.path, entry.view) for entry in entries if entry.status == 1] == [(b"bee/unreadable.png", 0)]
    assert sorted(entry.view for entry in good) == [0] * 6 + [1] * 6 + [2] * 6
    assert len({(entry.shard, entry.slot) for entry in good}) == 15
    assert len({entry.features for entry in good}) == 15
    assert_reads_as_tlc(reader, folder)


@pytest.mark.parametrize(
    "place", ["catalogue", "rows", "header", "features", "digests", "views", "checksums", "end of the shard"]
)
def test_a_flipped_bit_is_refused(reader: ModuleType, finished: Path, tamper: Any, place: str) -> None:
    catalogue = json.loads((finished / "catalogue.json").read_bytes())
    shard = catalogue["shards"][0]
    path = finished / shard["file"]
    if place in ("catalogue", "rows"):
        path = finished / ("catalogue.json" if place == "catalogue" else catalogue["rows"]["file"])
        offset = path.stat().st_size // 2
    elif place == "header":
        offset = 9
    elif place == "end of the shard":
        offset = path.stat().st_size - 1
    else:
        offset = shard[place]["offset"] + shard[place]["length"] // 2
    tamper(path, offset)
    with pytest.raises(reader.NotACache, match=r"checksum|digest"):
        reader.read_cache(finished)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_anywhere_is_refused(reader: ModuleType, golden: Path, name: str) -> None:
    for i in range(0, len(FILES[name]), 5):
        data = bytearray(FILES[name])
        data[i] ^= 1 << i % 8
        (golden / name).write_bytes(data)
        with pytest.raises(reader.NotACache):
            reader.read_cache(golden)


@pytest.mark.parametrize("place", ["features", "digests", "views", "checksums"])
def test_a_forged_shard_fails_its_rows_checksums(
    reader: ModuleType, golden: Path, tamper: Any, rewrite_catalogue: Any, place: str
) -> None:
    offset = json.loads(CATALOGUE)["shards"][0][place]["offset"]
    tamper(golden / SHARD_FILE, offset)
    digest = hashlib.sha256((golden / SHARD_FILE).read_bytes()).hexdigest()
    rewrite_catalogue(golden, lambda catalogue: catalogue["shards"][0].update(digest=digest))
    with pytest.raises(reader.NotACache, match=r"slot 0 of shard-00003.* fails its checksum"):
        reader.read_cache(golden)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_gone_or_no_file_is_refused(reader: ModuleType, golden: Path, name: str) -> None:
    path, data = golden / name, FILES[name]
    elsewhere = golden.parent / "elsewhere"
    elsewhere.write_bytes(data)
    path.write_bytes(data[:-1])
    with pytest.raises(reader.NotACache):
        reader.read_cache(golden)
    path.write_bytes(b"")
    with pytest.raises(reader.NotACache, match="0 bytes"):
        reader.read_cache(golden)
    path.unlink()
    with pytest.raises(reader.NotACache, match="cannot be opened"):
        reader.read_cache(golden)
    path.symlink_to(elsewhere)
    with pytest.raises(reader.NotACache, match="cannot be opened"):
        reader.read_cache(golden)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(reader.NotACache, match="no regular file"):
        reader.read_cache(golden)


def test_a_shard_cut_within_its_rows_is_refused_whatever_its_digest(
    reader: ModuleType, golden: Path, rewrite_catalogue: Any
) -> None:
    (golden / SHARD_FILE).write_bytes(SHARD[:-1])
    digest = hashlib.sha256(SHARD[:-1]).hexdigest()
    rewrite_catalogue(golden, lambda catalogue: catalogue["shards"][0].update(digest=digest))
    with pytest.raises(reader.NotACache, match="too short"):
        reader.read_cache(golden)


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(catalogue: Any) -> None:
        for key in keys[:-1]:
            catalogue = catalogue[key]
        catalogue[keys[-1]] = value

    return change


FORGED_CATALOGUES = {
    "schema 2": (put("schema_version", value=2), "schema_version is 2"),
    "schema true": (put("schema_version", value=True), "schema_version is True"),
    "another format": (put("format", value="zip"), "format"),
    "a key too many": (put("extra", value=1), "not an object of format"),
    "a key too few": (lambda catalogue: catalogue.pop("canaries"), "not an object of format"),
    "a number for a name": (put("data_name", value=1), "data_name"),
    "a relative root": (put("data_root", value="data"), "not absolute"),
    "a lone surrogate": (put("data_root", value="/\ud800"), "no path"),
    "a class of no name": (put("class_names", value=["ant", 1]), "class name"),
    "one for true": (put("has_given_split", value=1), "has_given_split"),
    "three canaries": (lambda catalogue: catalogue["canaries"].pop(), "four canaries"),
    "unequal canaries": (put("canaries", 1, value="0000803f"), "width"),
    "a canary of 7 digits": (put("canaries", 1, value="0000803"), "float32"),
    "a canary of NaN": (put("canaries", 1, value="0000c07f" * 3), "finite"),
    "rows key": (put("rows", "size", value=1), "not an object of file"),
    "rows of another name": (put("rows", "file", value="rows-00000000.safetensors"), "name"),
    "rows elsewhere": (put("rows", "file", value="../rows.safetensors"), "name"),
    "shard key": (put("shards", 0, "size", value=1), "not an object of file"),
    "shard elsewhere": (put("shards", 0, "file", value="../shard-00003.h5"), "name"),
    "another shard's name": (put("shards", 0, "file", value="shard-00004.h5"), "lies in no finished shard"),
    "shard twice": (lambda catalogue: catalogue["shards"].append(catalogue["shards"][0]), "order"),
    "no rows": (put("shards", 0, "n_rows", value=0), "no rows"),
    "rows too many": (put("shards", 0, "n_rows", value=4), "length"),
    "another dim": (put("shards", 0, "dim", value=4), "width"),
    "another dtype": (put("shards", 0, "dtype", value="float64"), "dtype"),
    "no batch": (put("shards", 0, "batch_size", value=0), "batch"),
    "a half row": (put("shards", 0, "n_rows", value=3.0), "n_rows"),
    "unfinished with a digest": (put("shards", 0, "finished", value=False), "digest"),
    "finished without a digest": (put("shards", 0, "digest", value=""), "digest"),
    "unfinished": (lambda catalogue: catalogue["shards"][0].update(finished=False, digest=""), "no finished shard"),
    "extent key": (put("shards", 0, "views", "end", value=1), "not an object of offset"),
    "unaligned": (put("shards", 0, "views", "offset", value=257), "multiple of 64"),
    "before the file": (put("shards", 0, "views", "offset", value=-64), "multiple of 64"),
    "overlap": (put("shards", 0, "views", "offset", value=128), "overlap"),
    "beyond the file": (put("shards", 0, "views", "offset", value=2**70), "too short"),
    "too long": (put("shards", 0, "views", "length", value=4), "length"),
    "run key": (put("provenance", 0, "host", value="x"), "not an object of date"),
    "another date": (put("provenance", 0, "date", value="today"), "ISO 8601"),
    "negative count": (put("provenance", 0, "reused", value=-1), "fewer"),
    "copied from a number": (put("provenance", 0, "copied_from", value=1), "copied_from"),
    "no total": (put("provenance", 0, "seconds", value={"load": 1.0}), "total"),
    "a version of no string": (put("provenance", 0, "versions", "torch", value=2.9), "versions"),
    "half a core": (put("provenance", 0, "machine", "cores", value=0.5), "machine"),
    "1,001 runs": (lambda catalogue: catalogue.update(provenance=catalogue["provenance"] * 1001), "too many runs"),
}


@pytest.mark.parametrize("what", FORGED_CATALOGUES)
def test_a_forged_catalogue_is_refused(reader: ModuleType, golden: Path, rewrite_catalogue: Any, what: str) -> None:
    change, message = FORGED_CATALOGUES[what]
    rewrite_catalogue(golden, change)
    with pytest.raises(reader.NotACache, match=message):
        reader.read_cache(golden)


COVERED = CATALOGUE.split("\n", 1)[1]
STRANGE_JSON = {
    "a key twice": ('"format": "transfercache",' + COVERED, "twice"),
    "a key twice within": (COVERED.replace('"dim": 3', '"dim": 3, "dim": 3'), "twice"),
    "NaN": (COVERED.replace("1.5", "NaN"), "NaN"),
    "Infinity": (COVERED.replace("1.5", "-Infinity"), "Infinity"),
    "a number beyond all": (COVERED.replace("1.5", "1e999"), "1e999"),
    "not ASCII": (COVERED.replace('"ant"', '"é"'), "ascii"),
    "more after its end": (COVERED + "{}", "Extra data"),
    "deep": (COVERED.replace('"eager"', "[" * 10 + "]" * 10), "too deep"),
    "deeper than a parser goes": (COVERED.replace('"eager"', "[" * 10**5), "too deep"),
    "too long": (COVERED + " " * 2**24, "bytes"),
}


@pytest.mark.parametrize("what", STRANGE_JSON)
def test_strange_json_is_refused(reader: ModuleType, golden: Path, what: str) -> None:
    text, message = STRANGE_JSON[what]
    sign_text(golden, text.encode())
    with pytest.raises(reader.NotACache, match=message):
        reader.read_cache(golden)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        (b'{"checksum":"', b'{"checksum": "'),
        (b'",\n', b'",\r\n'),
        (b'{"checksum"', b' {"checksum"'),
        (b"{", b"\xef\xbb\xbf{"),
    ],
)
def test_another_first_line_is_refused(reader: ModuleType, golden: Path, written: bytes, instead: bytes) -> None:
    (golden / "catalogue.json").write_bytes(CATALOGUE.encode().replace(written, instead, 1))
    with pytest.raises(reader.NotACache, match="first line"):
        reader.read_cache(golden)


@pytest.mark.parametrize(
    "text", [COVERED, COVERED.rstrip(), COVERED + " \t\r\n", COVERED.replace('"ant"', '"[[[\\"{{"')]
)
def test_other_json_of_the_same_kind_is_read(reader: ModuleType, golden: Path, text: str) -> None:
    sign_text(golden, text.encode())
    assert len(reader.read_cache(golden).entries) == 4


def int64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)


# An array, the byte within it to write at, what to write, and what the reader says.
FORGED_ROWS = {
    "offset back": ("path_offsets", 8, int64(21), "go back"),
    "offset beyond": ("path_offsets", 32, int64(39), "cover"),
    "offset not from 0": ("reason_offsets", 0, int64(-1), "cover"),
    "a zero byte in a path": ("path_bytes", 20, b"\0", "zero byte"),
    "negative size": ("size", 24, int64(-1), "negative size"),
    "view of no row": ("view", 0, b"\x01", "another view"),
    "view again": ("view", 2, b"\x01", "order"),
    "view of another row": ("view", 2, b"\x02", "differ"),
    "view of a bad row": ("view", 3, b"\x01", "bad row"),
    "label beyond": ("label", 16, int64(2), "range"),
    "label below": ("label", 24, int64(-2), "range"),
    "split": ("split", 2, b"\x04", "range"),
    "split of one view": ("split", 1, b"\x02", "differ"),
    "status": ("status", 3, b"\x02", "range"),
    "good with a reason": ("status", 3, b"\x00", "reason"),
    "bad with a slot": ("status", 2, b"\x01", "bad row"),
    "another shard": ("shard", 0, b"\x00", "no finished shard"),
    "slot beyond": ("slot", 16, int64(3), "outside"),
    "slot before": ("slot", 16, int64(-1), "outside"),
    "slot of another row": ("slot", 16, int64(1), "not what its slot holds"),
    "another digest": ("digest", 64, b"\xff", "not what its slot holds"),
}


@pytest.mark.parametrize("what", FORGED_ROWS)
def test_forged_rows_are_refused(reader: ModuleType, golden: Path, rewrite_catalogue: Any, what: str) -> None:
    name, offset, data, message = FORGED_ROWS[what]
    start = 8 + len(ROWS_HEADER) + json.loads(ROWS_HEADER)[name]["data_offsets"][0] + offset
    sign_rows(golden, ROWS[:start] + data + ROWS[start + len(data) :], rewrite_catalogue)
    with pytest.raises(reader.NotACache, match=message):
        reader.read_cache(golden)


def with_header(written: bytes, instead: bytes) -> bytes:
    header = ROWS_HEADER.replace(written, instead)
    assert header != ROWS_HEADER
    return len(header).to_bytes(8, "little") + header + ROWS[8 + len(ROWS_HEADER) :]


STRANGE_CONTAINERS = {
    "shorter than a length": (ROWS[:7], "no header"),
    "a header without end": (b"\xff" * 8 + ROWS[8:], "no header"),
    "an array too few": (with_header(b'"slot":{', b'"slow":{'), "not an object of size"),
    "an array twice": (with_header(b'"slot":{', b'"view":{"dtype":"U8"},"slot":{'), "twice"),
    "a key too many": (with_header(b'"slot":{', b'"slot":{"x":1,'), "not an object of dtype"),
    "another dtype": (with_header(b'"view":{"dtype":"U8"', b'"view":{"dtype":"I8"'), "another array"),
    "another shape": (with_header(b'"shape":[4,32]', b'"shape":[8,16]'), "another array"),
    "no shape": (with_header(b'"view":{"dtype":"U8","shape":[4]', b'"view":{"dtype":"U8","shape":[]'), "shape"),
    "half a shape": (with_header(b'"shape":[4,32]', b'"shape":[4.0,32]'), "shape"),
    "a place in two": (with_header(b'"data_offsets":[38,78]', b'"data_offsets":[37,78]'), "elsewhere"),
    "bytes between": (with_header(b'"data_offsets":[480,512]', b'"data_offsets":[481,513]'), "elsewhere"),
    "cut": (ROWS[:-1], "cut off"),
    "more": (ROWS + b"\0", "after the last"),
}


@pytest.mark.parametrize("what", STRANGE_CONTAINERS)
def test_a_strange_container_is_refused(reader: ModuleType, golden: Path, rewrite_catalogue: Any, what: str) -> None:
    data, message = STRANGE_CONTAINERS[what]
    sign_rows(golden, data, rewrite_catalogue)
    with pytest.raises(reader.NotACache, match=message):
        reader.read_cache(golden)
