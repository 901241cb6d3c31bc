from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.catalogue import Catalogue, Extent, RowsEntry, ShardEntry, read_catalogue
from transfercache.errors import CacheError, DataError
from transfercache.files import sha256_bytes


@pytest.fixture
def catalogue(extraction: Any, make_run: Any) -> Catalogue:
    shard = ShardEntry(
        file="shard-00002.h5",
        n_rows=10,
        dim=6,
        dtype="float32",
        batch_size=4,
        features=Extent(2048, 240),
        digests=Extent(2304, 320),
        views=Extent(2624, 10),
        checksums=Extent(2688, 80),
    )
    sha256 = sha256_bytes(b"rows")
    return Catalogue(
        spec=extraction.spec,
        data_name="insects",
        data_root="/data/\udcff insects",
        canaries=extraction.canaries,
        class_names=("ant", "été"),
        shards=(shard, replace(shard, file="shard-00007.h5", finished=True, digest="0" * 64)),
        rows=RowsEntry(f"rows-{sha256[:8]}.safetensors", sha256),
        provenance=(make_run(),),
    )


def _forged(catalogue: Catalogue, change: Callable[[dict[str, Any]], Any]) -> bytes:
    value = json.loads(catalogue.to_bytes())
    del value["checksum"]
    change(value)
    covered = json.dumps(value)[1:].encode()
    return b'{"checksum":"%s",\n' % sha256_bytes(covered).encode() + covered


def test_catalogue__round_trip_is_exact(catalogue: Catalogue) -> None:
    again = Catalogue.from_bytes(catalogue.to_bytes())
    assert again.canaries.tobytes() == catalogue.canaries.tobytes()
    for name in ("spec", "data_name", "data_root", "class_names", "shards", "rows", "provenance"):
        assert getattr(again, name) == getattr(catalogue, name)
    assert again.to_bytes() == catalogue.to_bytes()
    assert [shard.number for shard in again.shards] == [2, 7]


def test_catalogue__first_line_covers_the_rest(catalogue: Catalogue) -> None:
    first, _, rest = catalogue.to_bytes().partition(b"\n")
    assert first == b'{"checksum":"' + sha256_bytes(rest).encode() + b'",'


def test_catalogue__every_flipped_byte_is_refused(catalogue: Catalogue) -> None:
    data = catalogue.to_bytes()
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 4
        with pytest.raises(ValueError, match=r"fails its checksum|does not begin"):
            Catalogue.from_bytes(bytes(flipped))


def _set_shard(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda catalogue: catalogue["shards"][0].update({name: value})


def _set_run(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda catalogue: catalogue["provenance"][0].update({name: value})


def _nest(catalogue: dict[str, Any]) -> None:
    value: dict[str, Any] = {}
    for _ in range(30):
        value = {"deeper": value}
    catalogue["provenance"] = [value]


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an unknown key": (lambda c: c.update(extra=1), r"the catalogue has the fields \[.*'extra'"),
    "a missing key": (lambda c: c.pop("rows"), "the catalogue has the fields"),
    "a wrong type": (lambda c: c.update(data_name=3), "the catalogue: data_name is a int"),
    "another format": (lambda c: c.update(format="zip"), "the catalogue's format is 'zip'"),
    "another schema": (lambda c: c.update(schema_version=9), "a cache of schema 9, this tlc reads schema 1"),
    "a schema that is true": (lambda c: c.update(schema_version=True), "schema_version is a bool"),
    "a spec with another field": (lambda c: c["spec"].update(trick=1), "ExtractSpec has the fields"),
    "a mean beyond floats": (lambda c: c["spec"]["preprocessing"].update(mean=[10**400, 0, 0]), "too large"),
    "a shard outside the folder": (_set_shard("file", "../shard-00000.h5"), "is not the name of a shard file"),
    "a shard file with a newline": (_set_shard("file", "shard-00000.h5\n"), "is not the name of a shard file"),
    "a shard without rows": (_set_shard("n_rows", 0), "0 x 6 'float32' is no shape"),
    "rows of negative number": (_set_shard("n_rows", -10), "-10 x 6 'float32' is no shape"),
    "a bool for a number": (_set_shard("n_rows", True), "a shard: n_rows is a bool"),
    "another storage dtype": (_set_shard("dtype", "object"), "'object' is no shape and dtype"),
    "N x D beyond 64 bits": (_set_shard("n_rows", 1 << 62), "length is not that of"),
    "a length of another shape": (_set_shard("features", {"offset": 2048, "length": 244}), "length is not that of"),
    "overlapping datasets": (_set_shard("views", {"offset": 2304, "length": 10}), "datasets overlap"),
    "a negative offset": (_set_shard("features", {"offset": -256, "length": 240}), "datasets overlap"),
    "finished without a digest": (_set_shard("finished", True), "a finished shard has a digest"),
    "a digest too early": (_set_shard("digest", "0" * 64), "a finished shard has a digest"),
    "shards out of order": (lambda c: c["shards"].reverse(), "numbers do not increase"),
    "one shard twice": (lambda c: c["shards"].append(c["shards"][1]), "numbers do not increase"),
    "a shard of another width": (
        lambda c: c.update(canaries=[text[:16] for text in c["canaries"]]),
        "shard-00002.h5: of another width",
    ),
    "rows outside the folder": (lambda c: c["rows"].update(file="/etc/passwd"), "is not the name of a rows file"),
    "rows of another digest": (lambda c: c["rows"].update(sha256="1" * 64), "is not the name of a rows file"),
    "three canaries": (lambda c: c["canaries"].pop(), "canaries must be 4"),
    "canaries that are no hex": (lambda c: c["canaries"].__setitem__(0, "xyz"), "non-hexadecimal"),
    "a canary that is NaN": (lambda c: c.update(canaries=["0000c07f" * 6] * 4), "canaries are not finite"),
    "a class name that is a number": (lambda c: c["class_names"].append(3), "class_names must hold str"),
    "a run without a cost": (_set_run("seconds", {}), "a run's seconds must be numbers, and have a total"),
    "a run that took forever": (_set_run("seconds", {"total": 1e999}), "Infinity is not JSON"),
    "a run that took text": (_set_run("seconds", {"total": "1"}), "a run's seconds must be numbers"),
    "a run before its start": (_set_run("seconds", {"total": -1.0}), "finite and not negative"),
    "a run of negative rows": (_set_run("computed", -1), "a run's counts must lie between 0 and"),
    "a run of more rows than there are": (_set_run("computed", 10**30), "a run's counts must lie between 0 and"),
    "a run of no date": (_set_run("date", "yesterday"), "Invalid isoformat string"),
    "a run with a nested version": (_set_run("versions", {"torch": ["2"]}), "a run's versions must hold str"),
    "a run on a nested machine": (_set_run("machine", {"cores": {}}), "a run's machine must hold"),
    "a run with another field": (_set_run("trick", 1), "a run has the fields"),
    "a storage dtype that is none": (lambda c: c["spec"].update(storage_dtype="int8"), "storage_dtype 'int8' is none"),
    "rows that no run made": (lambda c: c.update(provenance=[]), "there are rows, and no run that made them"),
    "more runs than are kept": (lambda c: c.update(provenance=c["provenance"] * 1001), "1001 runs, more than 1000"),
    "a relative root": (lambda c: c.update(data_root="data"), "data_root 'data' is not absolute"),
    "a surrogate that is no byte": (lambda c: c.update(data_root="/\ud800"), "surrogates not allowed"),
    "a class of no encoding": (lambda c: c.update(class_names=["a", "\udc7f"]), "surrogates not allowed"),
    "a dataset off its line": (
        _set_shard("digests", {"offset": 2305, "length": 320}),
        "does not start at a multiple of 64",
    ),
    "JSON too deep": (_nest, "nested deeper than 12"),
}


@pytest.mark.parametrize("lie", LIES)
def test_from_bytes__lie_under_a_right_checksum(catalogue: Catalogue, lie: str) -> None:
    change, message = LIES[lie]
    with pytest.raises((ValueError, OverflowError), match=message):
        Catalogue.from_bytes(_forged(catalogue, change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'"a": NaN}', "NaN is not JSON"),
        (b'"a": 1, "a": 2}', "a key stands twice"),
        ('"a": "é"}'.encode(), "is not ASCII"),
        (b"[" * 1_000_000, "nested deeper than 12"),
        (b'"a": "\xff"}', "is not ASCII"),
        (b'"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"", "Expecting property name"),
    ],
)
def test_from_bytes__hostile_json(text: bytes, message: str) -> None:
    data = b'{"checksum":"%s",\n' % sha256_bytes(text).encode() + text
    with pytest.raises(ValueError, match=message):
        Catalogue.from_bytes(data)


def test_read_catalogue__names_the_file_and_the_next_step(tmp_path: Path, catalogue: Catalogue) -> None:
    (tmp_path / "catalogue.json").write_bytes(catalogue.to_bytes()[:-1])
    expected = f"{tmp_path}/catalogue.json: fails its checksum; remove the folder and make it anew with: tlc extract-"
    with pytest.raises(CacheError, match=re.escape(expected)):
        read_catalogue(tmp_path)


def test_to_bytes__refuses_to_outgrow_its_reader(catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match="class names take more than"):
        replace(catalogue, class_names=("x" * (17 << 20),)).to_bytes()


def test_catalogue__wrong_canaries(catalogue: Catalogue) -> None:
    for canaries in (np.zeros((3, 6), np.float32), np.zeros((4, 6), np.float64)):
        with pytest.raises(ValueError, match="canaries must be float32"):
            copy.copy(replace(catalogue, canaries=canaries))
